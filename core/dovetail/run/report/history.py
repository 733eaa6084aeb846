"""Everything a report draws of one run, read from its folder."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.run.overview import RunSummary, summarize_run
from dovetail.run.settings import parse_settings, read_config_text
from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.reading import read_records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOOP = ("step", "skip", "evaluation")
"""Records that the training loop writes; the others come at any time."""
MEDIA = ("figure", "histogram", "text", "artifact")
PICTURE = "report.png"
"""The report's own picture, which trackers get as a figure."""


@dataclass
class Series:
    """Numbers over optimizer steps and over time."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    times_s: array[float] = field(default_factory=lambda: array("d"))
    """Seconds of training, pauses before a resume left out."""
    values: array[float] = field(default_factory=lambda: array("d"))
    weights: array[float] | None = None
    """Seconds of each window, where the values are shares of them."""

    def add(self, step: float, time_s: float, value: float) -> None:
        """Append a point."""
        self.steps.append(step)
        self.times_s.append(time_s)
        self.values.append(value)

    def over(self, axis: str) -> NDArray[np.float64]:
        """Return the places of the points on an axis, "step" or "time"."""
        import numpy as np

        return np.array(self.steps if axis == "step" else self.times_s)


@dataclass
class RunHistory:
    """A run with its curves."""

    summary: RunSummary
    label: str
    """What tells it from the other runs of the report."""
    config_text: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted name."""
    series: dict[str, Series] = field(default_factory=dict)
    """By metric."""
    throughput: Series = field(default_factory=lambda: Series(weights=array("d")))
    """Items per second of each window."""
    wait: Series = field(default_factory=lambda: Series(weights=array("d")))
    """Share of each window's duration that the loop waited for data."""
    skips: Series = field(default_factory=Series)
    resumes: Series = field(default_factory=Series)
    checkpoints: Series = field(default_factory=Series)
    """Steps of the checkpoints that are still there."""
    media: list[dict[str, Any]] = field(default_factory=list)
    """Records of figures, texts, histograms and artifacts."""
    num_items: float = 0.0

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.summary.run_dir


def read_history(run_dir: Path, label: str | None = None) -> RunHistory:
    """Read a run, also one that is being written.

    Args:
        run_dir: Its folder; without a log the history is empty.
        label: What the report calls it; its id without it.
    """
    summary = summarize_run(run_dir)
    text = read_config_text(run_dir)
    history = RunHistory(summary, label or summary.id, text, parse_settings(text))
    reader = _Reader(history)
    if (run_dir / LOG_NAME).exists():
        for record in read_records(run_dir):
            reader.take(record)
    reader.place_checkpoints()
    return history


class _Reader:
    """Sorts records into a history; what it does not know, it leaves out."""

    def __init__(self, history: RunHistory) -> None:
        self._history = history
        self._clock_s = 0.0
        self._last_s: float | None = None
        self._window_start_s: float | None = None
        self._step = 0.0
        self._step_times: dict[int, float] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        kind = record.get("kind")
        is_resume = kind == "params" and self._last_s is not None
        self._tick(record.get("time"), is_pause=is_resume)
        step = record.get("step")
        if isinstance(step, (int, float)):
            self._step = float(step)
        history = self._history
        if kind == "params":
            history.settings = history.settings or record.get("params") or {}
            self._window_start_s = None
            if is_resume:
                history.resumes.add(self._step, self._clock_s, 0.0)
        elif kind == "skip":
            history.skips.add(self._step, self._clock_s, 0.0)
        elif kind in MEDIA and record.get("file") != PICTURE:
            history.media.append(dict(record))
        for name, value in _numbers(record.get("metrics")):
            series = history.series.get(name)
            if series is None:
                series = history.series[name] = Series()
            series.add(self._step, self._clock_s, value)
        if kind in _LOOP:
            if kind == "step":
                self._measure_window(record)
            self._window_start_s = self._clock_s

    def _tick(self, time_s: Any, *, is_pause: bool) -> None:
        if not isinstance(time_s, (int, float)):
            return
        # A clock that was set back stands still until it has caught up.
        if self._last_s is not None and not is_pause:
            self._clock_s += max(0.0, time_s - self._last_s)
        self._last_s = time_s

    def _measure_window(self, record: Mapping[str, Any]) -> None:
        self._step_times[int(self._step)] = self._clock_s
        items, wait_s = record.get("items"), record.get("wait_s")
        if isinstance(items, (int, float)):
            self._history.num_items += items
        # What lies between the begin and the first step is more than a window.
        if self._window_start_s is None or self._clock_s <= self._window_start_s:
            return
        duration_s = self._clock_s - self._window_start_s
        for series, part in (
            (self._history.throughput, items),
            (self._history.wait, wait_s),
        ):
            if isinstance(part, (int, float)) and series.weights is not None:
                series.add(self._step, self._clock_s, part / duration_s)
                series.weights.append(duration_s)

    def place_checkpoints(self) -> None:
        """Mark the checkpoints that the folder holds."""
        for path in sorted((self._history.run_dir / "checkpoints").glob("step-*")):
            digits = path.name.removeprefix("step-")
            if digits.isdigit() and int(digits) in self._step_times:
                step = int(digits)
                self._history.checkpoints.add(step, self._step_times[step], 0.0)


def _numbers(metrics: Any) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                yield str(name), float(value)
