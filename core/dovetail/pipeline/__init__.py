"""The whole job: a config in, a trained model, its metrics and a proven bundle out."""

from __future__ import annotations

from dovetail.pipeline.job import Job, train
from dovetail.pipeline.result import TrainingResult

__all__ = ["Job", "TrainingResult", "train"]
