"""What a run tells whoever watches it: a progress bar, a notebook, a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPlan:
    """What a run is about to do."""

    name: str
    device: str
    num_parameters: int
    num_epochs: int
    batches_per_epoch: int | None
    """Micro-batches per epoch; `None` where the data have no length."""
    total_steps: int | None
    first_epoch: int = 0
    """Epoch the run begins with; more than 0 for a resumed run."""


class RunObserver:
    """Hears of a run's progress; every method does nothing until it is overridden.

    The methods are called in the training thread: what they do costs the run.
    """

    def on_start(self, plan: RunPlan, run_dir: Path) -> None:
        """The first step is about to begin."""

    def on_step(
        self, epoch: int, micro_batch: int, step: int, metrics: Mapping[str, float]
    ) -> None:
        """An optimizer step was taken.

        Args:
            epoch: The epoch, from 0.
            micro_batch: Micro-batches of the epoch that are done.
            step: Optimizer steps taken in all.
            metrics: The record of the step: `train/loss`, `train/lr`, `train/items` and more.
        """

    def on_evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """The validation split was evaluated at the end of an epoch."""

    def on_checkpoint(self, path: Path, is_best: bool) -> None:
        """A checkpoint was written."""

    def on_message(self, text: str) -> None:
        """Something worth a line happened, such as an early stop."""

    def on_export(self, format_name: str, stage: str) -> None:
        """The bundle has come to a stage ("export", "proof") of a format."""
