"""The best evaluation of a run so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dovetail.run.checkpoint import Progress, checkpoint_path


class Best:
    """Knows the best value of the metric that is monitored, and where it was.

    Args:
        mode: "min" where smaller is better, "max" where larger is.
        progress: How far the run had come; what was best then.
    """

    def __init__(self, mode: Literal["min", "max"], progress: Progress) -> None:
        self.value = progress.best_value
        self.step = progress.best_step
        self.metrics = dict(progress.best_metrics)
        self._mode = mode
        self._before = self.value, self.step, self.metrics

    def offer(self, value: float | None, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation if it is better than all before; return whether it is.

        Args:
            value: Of the metric that is monitored; `None` and NaN are never best.
            step: Optimizer step of the evaluation.
            metrics: All metrics there.
        """
        if value is None or math.isnan(value):
            return False
        if self.value is not None:
            is_better = value < self.value if self._mode == "min" else value > self.value
            if not is_better:
                return False
        self._before = self.value, self.step, self.metrics
        self.value, self.step, self.metrics = value, step, dict(metrics)
        return True

    def take_back(self) -> None:
        """Forget the last one that was better: it has no checkpoint to go back to."""
        self.value, self.step, self.metrics = self._before

    def find(self, checkpoint_dir: Path, last: Path | None) -> Path | None:
        """Return its checkpoint, or the last one where it has none."""
        if self.step is None:
            return last
        path = checkpoint_path(checkpoint_dir, self.step)
        return path if path.exists() else last
