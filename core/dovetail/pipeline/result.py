"""What a run left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dovetail.run.tracking import read_metrics

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    status: str
    """"completed", "stopped early" or "interrupted"."""
    run_dir: Path
    final_metrics: Mapping[str, float]
    best_metrics: Mapping[str, float]
    """Metrics of the best checkpoint."""
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    num_steps: int
    duration_s: float
    model: nn.Module
    """The model with the weights of the best checkpoint."""
    bundle: BundleReport | None = None
    """What was exported; `None` where nothing was to be."""
    report: Path | None = None
    """Page with the run's curves; `None` without `run.report`, or without matplotlib."""
    parked_trackers: Mapping[str, str] = field(default_factory=dict)
    """Trackers that lack records, and why; `dovetail log sync` hands them over later."""

    @property
    def metrics_path(self) -> Path:
        """The metric log."""
        return self.run_dir / "metrics.jsonl"

    @property
    def metrics(self) -> Any:
        """All metrics as a table; see `dovetail.read_metrics`."""
        return read_metrics(self.run_dir)
