"""What the records of a run tell, in the words and the bar of `dovetail watch`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from dovetail.cli._watch import Standing, spell_count, spell_metrics
from dovetail.run.settings import flatten
from dovetail.run.spelling import spell_duration

SILENCE_S = 60.0
"""Seconds without a record after which it is said."""


class RunStory:
    """Takes records one by one and tells how the run stands.

    Args:
        settings: The run's settings by dotted name, as far as they are known.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = dict(settings or {})
        self._metrics: dict[str, float] = {}
        self._step = 0
        self._epoch = 0
        self._steps_before = 0
        self._history: deque[tuple[float, int, float]] = deque(maxlen=100)
        self._items = 0.0
        self._last_s: float | None = None
        self.end: Mapping[str, Any] | None = None
        """The record of the run's end."""

    @property
    def step(self) -> int:
        """The last optimizer step."""
        return self._step

    def take(self, record: Mapping[str, Any]) -> str | None:
        """Take a record; return the line that it is worth, if any."""
        kind, metrics = record.get("kind"), record.get("metrics") or {}
        if isinstance(record.get("time"), (int, float)):
            self._last_s = record["time"]
        self.end = record if kind == "end" else None
        if kind == "params":
            self._settings.update(flatten(record.get("params") or {}))
            # A pause before a resume is no slow step.
            self._history.clear()
        if kind == "step":
            self._take_step(record)
        if kind == "evaluation":
            self._take_place(record)
            self._metrics.update(metrics)
            return f"{self._where()}: {spell_metrics(self._metrics)}"
        if kind == "skip":
            self._take_place(record)
            loss = record.get("loss")
            return f"{self._where()}: a window was skipped (loss {loss})"
        return None

    def _take_place(self, record: Mapping[str, Any]) -> None:
        step, epoch = record.get("step"), record.get("epoch")
        if isinstance(epoch, int) and epoch != self._epoch:
            # Before it is counted, the step is still the last one of the epoch that is over.
            self._steps_before, self._epoch = self._step, epoch
        self._step = step if isinstance(step, int) else self._step

    def _take_step(self, record: Mapping[str, Any]) -> None:
        self._take_place(record)
        self._metrics.update(record.get("metrics") or {})
        items = record.get("items")
        self._items += items if isinstance(items, (int, float)) else 0.0
        if self._last_s is not None:
            self._history.append((self._last_s, self._step, self._items))

    def silence(self, now_s: float | None = None) -> str:
        """Return how long nothing came, once that is long; else nothing."""
        if self._last_s is None:
            return ""
        quiet_s = (time.time() if now_s is None else now_s) - self._last_s
        return f"last record {spell_duration(quiet_s)} ago" if quiet_s > SILENCE_S else ""

    def standing(self) -> Standing:
        """Return how the run stands, for a bar."""
        if self._last_s is None:
            return Standing("no record yet")
        total = self._total_steps()
        numbers = self.silence() or self._describe_speed(total)
        loss = self._metrics.get("train/loss")
        right = [f"loss {loss:.4g}"] if loss is not None else []
        fraction = min(1.0, self._step / total) if total else None
        return Standing(self._where(total), "  ".join([*right, numbers]).strip(), fraction)

    def line(self) -> str:
        """Return how the run stands, in a line."""
        return f"{self._where()}: {spell_metrics(self._metrics)}; {self._describe_speed(None)}"

    def _where(self, total: int | None = None) -> str:
        epochs = self._settings.get("train.epochs")
        epoch = f"epoch {self._epoch + 1}/{epochs}  " if isinstance(epochs, int) else ""
        return f"{epoch}step {self._step}" + (f"/{total}" if total else "")

    def _total_steps(self) -> int | None:
        """Return how many steps the run will have, which is known after its first epoch."""
        limit, epochs = (self._settings.get(f"train.{key}") for key in ("max_steps", "epochs"))
        limits = [limit] if isinstance(limit, int) else []
        if isinstance(epochs, int) and self._steps_before and self._epoch > 0:
            limits.append(round(self._steps_before / self._epoch * epochs))
        return max(min(limits), self._step) if limits else None

    def _describe_speed(self, total: int | None) -> str:
        if len(self._history) < 2:
            return ""
        (start_s, first_step, first), (end_s, last_step, last) = self._history[0], self._history[-1]
        elapsed_s = end_s - start_s
        if elapsed_s <= 0 or last_step <= first_step:
            return ""
        per_s = (last_step - first_step) / elapsed_s
        if last > first:
            words = f"{spell_count((last - first) / elapsed_s)} items/s"
        else:
            words = f"{spell_count(per_s)} steps/s"
        if total and total > last_step:
            words += f"  {spell_duration((total - last_step) / per_s)} left"
        return words
