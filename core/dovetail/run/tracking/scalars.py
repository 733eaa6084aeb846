"""Values of micro-batches on their way into one record per optimizer step, for `MetricsTracker`."""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass, field
from typing import Any

from dovetail.errors import ConfigError, build_message
from dovetail.run.tracking.values import Value, add_up, to_floats


@dataclass(eq=False)
class Scalar:
    """One value that was logged."""

    step: int
    """Micro-batch, from 0."""
    effective_step: int
    """Optimizer step, from 0."""
    metric: str
    value: Value
    timestamp: float
    """Seconds since the epoch of Unix."""


@dataclass(frozen=True)
class ClosedWindow:
    """What the values of one optimizer step came to."""

    step: int
    """The optimizer step, from 0."""
    last_micro_step: int
    means: dict[str, float]


@dataclass
class _Window:
    rows: list[Scalar] = field(default_factory=list)
    is_committed: bool = False


class ScalarWindows:
    """Gathers values by the optimizer step they belong to.

    Args:
        accumulation_steps: Micro-batches per optimizer step, as long as no accumulator is attached.
    """

    def __init__(self, accumulation_steps: int) -> None:
        self.rows: list[Scalar] = []
        """Everything that was logged."""
        self._steps = accumulation_steps
        self._windows: dict[int, _Window] = {}
        self._next_step: dict[str, int] = {}
        self._last_given: dict[str, int] = {}
        self._accumulator: Any = None
        self._first_total = 0
        self._is_before: dict[str, bool] = {}
        self._last_skipped: Any = None

    def attach(self, accumulator: Any) -> None:
        """Let an accumulator say which optimizer step a value belongs to."""
        self._accumulator = accumulator
        self._first_total = self._total_micro_batches()
        self._is_before.clear()

    def add(
        self, metric: str, value: Value, step: int | None, *, commit: bool
    ) -> list[ClosedWindow]:
        """Add a value and return the windows that it closes, first to last.

        Raises:
            ConfigError: The step is no index.
        """
        place = self._next_step.get(metric, 0) if step is None else _as_index(step)
        self._next_step[metric] = place + 1
        if self._accumulator is None:
            effective = number = place // self._steps
            is_kept = True
        else:
            effective = int(self._accumulator.effective_step)
            number, is_kept = self._window_of(metric, effective)
        row = Scalar(place, effective, metric, value, time.time())
        self.rows.append(row)
        if not is_kept:
            return []
        closed: list[ClosedWindow] = []
        if commit and step is not None and self._accumulator is None:
            closed = self._close_pass(metric, place)
        return closed + self._hold(number, row, commit)

    def _hold(self, number: int, row: Scalar, commit: bool) -> list[ClosedWindow]:
        window = self._windows.setdefault(number, _Window())
        window.rows.append(row)
        if not commit or window.is_committed:
            return []
        window.is_committed = True
        return self._close([n for n in self._windows if n < number])

    def _close_pass(self, metric: str, place: int) -> list[ClosedWindow]:
        """Close everything where the steps begin anew, as with those of another epoch."""
        begins_anew = place < self._last_given.get(metric, 0)
        if begins_anew:
            self._last_given.clear()
        self._last_given[metric] = place
        return self.close() if begins_anew else []

    def close(self) -> list[ClosedWindow]:
        """Close and return the windows that are open."""
        return self._close(list(self._windows))

    def _close(self, numbers: list[int]) -> list[ClosedWindow]:
        closed = []
        for number in sorted(numbers):
            rows = self._windows.pop(number).rows
            settle(rows)
            values: dict[str, list[Any]] = {}
            for row in rows:
                values.setdefault(row.metric, []).append(row.value)
            means = {name: add_up(found) / len(found) for name, found in values.items()}
            closed.append(ClosedWindow(number, max(row.step for row in rows), means))
        return closed

    def _window_of(self, metric: str, effective: int) -> tuple[int, bool]:
        """Return the window of a value, and whether it counts: that of a skipped one does not."""
        accumulator = self._accumulator
        is_open = getattr(accumulator, "is_window_open", True)
        # Between two windows a value is the last of the one before if it is logged after
        # `accumulate`, and else the first of the next. The first value of all tells which.
        is_before = self._is_before.get(metric)
        if is_before is None:
            is_before = not is_open and self._total_micro_batches() == self._first_total
            self._is_before[metric] = is_before
        last = getattr(accumulator, "last_window", None)
        is_after_skip = not is_open and last is not None and last.is_skipped
        if is_after_skip and last is not self._last_skipped:
            self._last_skipped = last
            self._windows.pop(effective, None)
        if is_before or is_open:
            return effective, True
        return (effective, False) if is_after_skip else (max(effective - 1, 0), True)

    def _total_micro_batches(self) -> int:
        stats = getattr(self._accumulator, "stats", None)
        return 0 if stats is None else int(stats.total_steps)


def settle(rows: list[Scalar]) -> None:
    """Bring values that are still on a device to the host, all at once."""
    waiting = [row for row in rows if not isinstance(row.value, float)]
    for row, number in zip(waiting, to_floats([row.value for row in waiting]), strict=True):
        row.value = number


def _as_index(step: Any) -> int:
    try:
        place = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        place = -1
    if place < 0:
        expected = "an integer >= 0, the micro-batch"
        where = "MetricsTracker.log_scalar"
        raise ConfigError(build_message(where, f"step is {step!r}", expected))
    return place
