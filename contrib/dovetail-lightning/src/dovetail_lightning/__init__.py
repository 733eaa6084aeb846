"""Trains what a dovetail config says on Lightning's Trainer, with steps as exact as dovetail's own.

`DovetailModule` is model, data, loss, optimizer and schedule of the config; `MetricLogCallback`
writes the run's folder, with its metric log, and feeds the config's trackers.
"""

from __future__ import annotations

from dovetail_lightning._callback import MetricLogCallback
from dovetail_lightning._module import DovetailModule

__all__ = ["DovetailModule", "MetricLogCallback"]
