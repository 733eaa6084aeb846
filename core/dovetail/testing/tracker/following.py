"""Feeds a tracker as a run does, and puts faults between the two."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.session import FLUSH_S, Tracking, open_log
from dovetail.types import Tracker

Rows: TypeAlias = list[tuple[int, dict[str, float]]]
"""What a store holds, in its order: optimizer step and metrics."""

Series: TypeAlias = list[tuple[int, float]]
"""Steps and values of one metric."""

FOLLOWED = "followed"
"""Name of the tracker in messages and in the name of its cursor."""


def step_record(step: int, **metrics: float) -> dict[str, Any]:
    """Return the record of an optimizer step, as the loop writes it."""
    values = {"train/loss": float(step), "train/lr": 0.5, **metrics}
    return {"kind": "step", "step": step, "epoch": 0, "metrics": values}


def file_record(kind: str, step: int, name: str, file: str) -> dict[str, Any]:
    """Return a record that refers to a file in the run's folder."""
    return {"kind": kind, "step": step, "name": name, "file": file, "time": 0.0}


def evaluation_record(step: int, **metrics: float) -> dict[str, Any]:
    """Return the record of an evaluation, as the loop writes it."""
    values = {"val/loss": step + 0.25, **metrics}
    return {"kind": "evaluation", "step": step, "epoch": 0, "metrics": values}


class _BrokenRunError(Exception):
    """Ends a run as failed."""


_ENDS: dict[str, type[BaseException]] = {
    "interrupted": KeyboardInterrupt,
    "failed": _BrokenRunError,
}


class Followed:
    """A metric log that is written while one tracker follows it; what `following` yields."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self.warnings: list[str] = []
        """Everything that was warned of, once the log is closed."""

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records."""
        for record in records:
            self._tracking.log.write(record)

    def tell(self) -> int:
        """Return the length of the log in bytes."""
        return self._tracking.log.tell()

    @property
    def parked(self) -> list[str]:
        """Why the tracker was given up, or what it refused; empty if it took everything."""
        return [
            text for text in self.warnings if " is parked: " in text or " does not take " in text
        ]


@contextlib.contextmanager
def following(
    directory: Path,
    tracker: Tracker,
    *,
    params: Mapping[str, Any] | None = None,
    status: str = "completed",
    resumed_at: tuple[int, int] | None = None,
    flush_s: float = FLUSH_S,
) -> Iterator[Followed]:
    """Follow a run from its beginning, or a resume, to its end.

    Args:
        directory: The run's folder.
        tracker: Who is fed.
        params: The run's settings.
        status: How the run ends; an interrupted or failed one ends by an exception.
        resumed_at: Optimizer step and length of the log in bytes that it resumes from.
        flush_s: Seconds the tracker gets at the end.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = open_log(directory, resumed_at)
        tracking = Tracking(log, {FOLLOWED: tracker}, params or {}, flush_s=flush_s)
        followed = Followed(tracking)
        end = _ENDS.get(status)
        with contextlib.suppress(*filter(None, [end])), tracking:
            yield followed
            if end is not None:
                raise end
            tracking.status = status
        followed.warnings += [str(warning.message) for warning in caught]


class Proxy:
    """Hands everything on to a tracker, after `before` was called with the number of the record.

    Args:
        tracker: Who is fed in the end.
        before: Called with 1, 2, ... before each record; it may raise, or wait.
    """

    def __init__(self, tracker: Tracker, before: Callable[[int], None]) -> None:
        self._tracker = tracker
        self._before = before
        self._num_calls = 0

    def __getattr__(self, name: str) -> Any:
        """Return a member of the tracker; records come one by one here, never by `log_many`."""
        if name == "log_many":
            raise AttributeError(name)
        return getattr(self._tracker, name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record, unless `before` raises."""
        self._num_calls += 1
        self._before(self._num_calls)
        self._tracker.log(metrics, step)


@contextlib.contextmanager
def quick_retries() -> Iterator[None]:
    """Give a tracker up after two tries, so that the pauses between four need not be waited for."""
    before, Follower.NUM_TRIES = Follower.NUM_TRIES, 2
    try:
        yield
    finally:
        Follower.NUM_TRIES = before


def join_follower() -> None:
    """Wait for the thread of a tracker that was given up while it hung."""
    for thread in threading.enumerate():
        if thread.name == f"dovetail-{FOLLOWED}":
            thread.join(60)


def series_of(rows: Rows, name: str) -> Series:
    """Return steps and values of one metric, in the store's order."""
    return [(step, metrics[name]) for step, metrics in rows if name in metrics]


def expected_series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Return steps and values of one metric, in the log's order."""
    return series_of([(r["step"], r["metrics"]) for r in records if "metrics" in r], name)


def is_near(found: float, wanted: float, tolerance: float) -> bool:
    """Return whether a stored number is the one that was logged, NaN equal to NaN."""
    if not math.isfinite(wanted):
        return math.isnan(found) if math.isnan(wanted) else found == wanted
    return abs(found - wanted) <= tolerance * abs(wanted)


def describe_difference(found: Series, wanted: Series, tolerance: float) -> str:
    """Say how a series differs from what was logged; an empty text if it does not."""
    steps, expected = [step for step, _ in found], [step for step, _ in wanted]
    missing = sorted(set(expected) - set(steps))
    doubled = sorted({step for step in steps if steps.count(step) > expected.count(step)})
    if missing:
        return (
            f"{len(missing)} of {len(wanted)} records are missing, the first at step {missing[0]}"
        )
    if doubled:
        strange = [step for step in doubled if step not in expected]
        kind = "was never logged" if strange else "stands there more than once"
        return f"step {(strange or doubled)[0]} {kind} ({len(strange or doubled)} such steps)"
    if steps != expected:
        pairs = zip(steps, expected, strict=True)
        step, logged = next((a, b) for a, b in pairs if a != b)
        return f"the order is wrong: step {step} stands where {logged} was logged"
    for (step, value), (_, number) in zip(found, wanted, strict=True):
        if not is_near(value, number, tolerance):
            return f"step {step} holds {value!r} where {number!r} was logged"
    return ""
