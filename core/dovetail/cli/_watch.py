"""What a run's progress looks like in words, for a bar that moves and for plain lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

from dovetail.run.observer import RunObserver, RunPlan
from dovetail.run.spelling import spell_duration

ITEMS = "train/items"
_STAGES = {"export": "exporting", "proof": "proving"}
_HIDDEN = frozenset({ITEMS, "train/lr", "train/grad_norm"})


@dataclass(frozen=True)
class Standing:
    """How far a run has come."""

    left: str
    """Where it is."""
    right: str = ""
    """How it does."""
    fraction: float | None = None
    """Share that is done; `None` where the end is not known."""


class RunWatcher(RunObserver):
    """Turns what a run tells into lines, and answers how it stands.

    `on_step` only stores: whoever draws a bar asks `standing` when it wants to.

    Args:
        say: Prints a line.
        heartbeat_s: Seconds between two lines inside an epoch; without it there are none.
    """

    def __init__(self, say: Callable[[str], None], heartbeat_s: float | None = None) -> None:
        self.run_dir: Path | None = None
        """The run's folder, once there is one."""
        self._say = say
        self._heartbeat_s = heartbeat_s or inf
        self._next_beat_s = inf
        self._plan: RunPlan | None = None
        # One tuple, so that the thread that draws never sees half of a step.
        self._latest: tuple[int, int, int, Mapping[str, float]] | None = None
        self._epoch: int | None = None
        self._epoch_start_s = 0.0
        self._items = 0.0
        self._evaluation: Mapping[str, float] | None = None
        self._stage = "preparing"
        self._history: deque[tuple[float, int, float]] = deque(maxlen=100)

    def on_start(self, plan: RunPlan, run_dir: Path) -> None:
        """Print what the run is about to do."""
        self._plan, self.run_dir = plan, run_dir
        size = "" if plan.total_steps is None else f"{plan.total_steps} steps in "
        epochs = f"{plan.num_epochs} epoch{'s' if plan.num_epochs > 1 else ''}"
        first = f", from epoch {plan.first_epoch + 1}" if plan.first_epoch else ""
        self._say(f"run {run_dir}")
        self._say(f"{plan.num_parameters:,} parameters on {plan.device}; {size}{epochs}{first}")
        self._stage = ""
        self._epoch_start_s = time.perf_counter()
        self._next_beat_s = self._epoch_start_s + self._heartbeat_s

    def on_step(
        self, epoch: int, micro_batch: int, step: int, metrics: Mapping[str, float]
    ) -> None:
        """Keep where the run is."""
        if epoch != self._epoch:
            self._end_epoch("")
            self._epoch = epoch
        self._latest = (epoch, micro_batch, step, metrics)
        self._items += metrics.get(ITEMS, 0.0)
        now_s = time.perf_counter()
        if not self._history:
            # The first step is slow; speed is counted from its end.
            self._history.append((now_s, step, self._items))
        if now_s >= self._next_beat_s:
            self._beat()

    def on_evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics for the epoch's line, which waits for the checkpoint."""
        self._evaluation = metrics
        if self._epoch is None:
            # A run that was interrupted in an evaluation goes on with it, without a step.
            self._epoch, self._latest = epoch, self._latest or (epoch, 0, step, {})

    def on_checkpoint(self, path: Path, is_best: bool) -> None:
        """Print the epoch's line, if this checkpoint ends one."""
        if self._evaluation is not None or self._is_epoch_done():
            self._end_epoch(", best" if is_best else "")

    def on_message(self, text: str) -> None:
        """Print it."""
        self._say(text)

    def on_export(self, format_name: str, stage: str) -> None:
        """Print what happens to a format."""
        self._stage = f"{format_name}: {_STAGES.get(stage, stage)}"
        self._say(self._stage)

    def finish(self) -> None:
        """Print the line of an epoch that was left in the middle."""
        size = self._plan.batches_per_epoch if self._plan is not None else None
        self._end_epoch("" if size is None or self._is_epoch_done() else ", unfinished")

    def standing(self) -> Standing:
        """Tell how the run stands; called from any thread."""
        plan, latest = self._plan, self._latest
        if self._stage or plan is None or latest is None:
            return Standing(self._stage or "first step")
        epoch, micro_batch, step, metrics = latest
        now_s = time.perf_counter()
        if not self._history or self._history[-1][1] != step:
            self._history.append((now_s, step, self._items))
        total = plan.total_steps
        left = f"epoch {epoch + 1}/{plan.num_epochs}  step {step}" + (f"/{total}" if total else "")
        right = [f"loss {metrics['train/loss']:.4g}"] if "train/loss" in metrics else []
        if plan.batches_per_epoch is not None and micro_batch >= plan.batches_per_epoch:
            right.append("evaluating")
        else:
            right += self._describe_speed(step, total)
        return Standing(left, "  ".join(right), min(1.0, step / total) if total else None)

    def _describe_speed(self, step: int, total: int | None) -> list[str]:
        start_s, first_step, first_items = self._history[0]
        end_s, last_step, last_items = self._history[-1]
        elapsed_s = end_s - start_s
        if last_step <= first_step or elapsed_s <= 0:
            return []
        steps_per_s = (last_step - first_step) / elapsed_s
        num_items = last_items - first_items
        if num_items:
            words = [f"{spell_count(num_items / elapsed_s)} items/s"]
        else:
            words = [f"{spell_count(steps_per_s)} steps/s"]
        if total:
            words.append(f"{spell_duration((total - step) / steps_per_s)} left")
        return words

    def _beat(self) -> None:
        standing = self.standing()
        self._say(f"{standing.left}  {standing.right}")
        self._next_beat_s = time.perf_counter() + self._heartbeat_s

    def _is_epoch_done(self) -> bool:
        if self._plan is None or self._latest is None or self._epoch is None:
            return False
        size = self._plan.batches_per_epoch
        return size is not None and self._latest[1] >= size

    def _end_epoch(self, note: str) -> None:
        """Print the line of the epoch, once."""
        if self._plan is None or self._latest is None or self._epoch is None:
            return
        now_s = time.perf_counter()
        metrics = self._latest[3]
        told = spell_metrics({**metrics, **(self._evaluation or {})})
        self._say(
            f"epoch {self._epoch + 1}/{self._plan.num_epochs}: {told}; "
            f"{spell_duration(now_s - self._epoch_start_s)}{note}"
        )
        self._epoch, self._evaluation, self._epoch_start_s = None, None, now_s
        self._next_beat_s = now_s + self._heartbeat_s


def spell_metrics(metrics: Mapping[str, float]) -> str:
    """Return metrics by the split they are of: train loss 0.24; val loss 0.31, accuracy 0.9."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        split, _, rest = name.rpartition("/")
        if name not in _HIDDEN:
            groups.setdefault(split, []).append(f"{rest} {value:.4g}")
    return "; ".join(f"{split} {', '.join(values)}".strip() for split, values in groups.items())


def spell_count(number: float) -> str:
    """Return a number with three digits that matter: 12.3, 987, 1.2k, 3.4M."""
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number * (1e-6 if unit == 'M' else 1e-3):.3g}{unit}"
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"
