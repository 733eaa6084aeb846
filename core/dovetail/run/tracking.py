"""The metric log: one durable file that is the truth of a run, and what follows it.

Each record is one JSON object on a line of `metrics.jsonl`, written whole in the training thread
before anybody else sees it, so that it survives a `kill -9` of the process. Trackers never stand
in the loop: a follower reads the file and feeds each of them from a thread of its own.
"""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dovetail.errors import RunError, build_message
from dovetail.types import Tracker

LOG_NAME = "metrics.jsonl"

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricLog:
    """Appends records to a run's `metrics.jsonl`.

    Args:
        directory: The run's folder. An existing log is continued; a last line that was torn by a
            crash is cut off.

    Raises:
        RunError: The file cannot be opened for writing.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME
        try:
            repair(self.path)
            # Line buffering hands each record to the kernel at once: it outlives the process.
            self._file = self.path.open("a", encoding="utf-8", buffering=1, newline="\n")
        except OSError as err:
            found = f"cannot be written: {err.strerror}"
            raise RunError(build_message(f"metric log {str(self.path)!r}", found)) from err
        self._seen_non_finite: set[str] = set()
        self._num_lost = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; a full disk loses the record, says so once, and stops nothing.

        Args:
            record: JSON-able values. NaN and infinities become strings, with one warning per
                metric.
        """
        try:
            line = _encode(record)
        except ValueError:
            line = _encode(self._spell_non_finite(record))
        try:
            self._file.write(line + "\n")
        except OSError as err:
            self._lose(err)

    def _lose(self, err: OSError) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            text = f"cannot be written: {err.strerror}; the run goes on without its records"
            warnings.warn(build_message(f"metric log {str(self.path)!r}", text), stacklevel=3)

    def _spell_non_finite(
        self, record: Mapping[str, Any], *, is_metrics: bool = False
    ) -> dict[str, Any]:
        spelled: dict[str, Any] = {}
        for key, value in record.items():
            if isinstance(value, Mapping):
                spelled[key] = self._spell_non_finite(value, is_metrics=key == "metrics")
            elif isinstance(value, float) and not math.isfinite(value):
                spelled[key] = spell(value)
                if is_metrics and key not in self._seen_non_finite:
                    self._seen_non_finite.add(key)
                    warnings.warn(f"metric {key!r} is {value} for the first time", stacklevel=4)
            else:
                spelled[key] = value
        return spelled

    @property
    def num_lost(self) -> int:
        """Records that could not be written."""
        return self._num_lost

    def tell(self) -> int:
        """Return the length of the log in bytes, for a checkpoint."""
        return self.path.stat().st_size

    def rewind(self, size_bytes: int) -> None:
        """Drop everything after the first `size_bytes`, as a resumed run writes it again."""
        # A torn last line may have been cut off since; truncating to more would add zero bytes.
        self._file.truncate(min(size_bytes, self.tell()))

    def close(self) -> None:
        """Close the file; what a full disk held back is lost then."""
        try:
            self._file.close()
        except OSError as err:
            self._lose(err)


def spell(value: float) -> str:
    """Return a non-finite number as strict JSON can hold it."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def repair(path: Path) -> None:
    """Cut off a last line without its end, which a crash of the machine may leave."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, also of one that is being written.

    Args:
        path: The log, or the folder of the run.

    Raises:
        RunError: There is no log, or it cannot be read.
    """
    path = path / LOG_NAME if path.is_dir() else path
    try:
        file = path.open("rb")
    except OSError as err:
        where = f"metric log {str(path)!r}"
        raise RunError(build_message(where, f"cannot be read: {err.strerror}")) from err
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = parse_record(line)
            if record is not None:
                yield record
            else:
                text = build_message(f"metric log {str(path)!r} line {number}", "holds no record")
                warnings.warn(text, stacklevel=2)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, spelled-out numbers as numbers again.

    A line that a failing disk has damaged holds none; the others stay readable.
    """
    try:
        record: dict[str, Any] = json.loads(line)
        metrics = record.get("metrics")
    except (ValueError, AttributeError):
        return None
    if metrics:
        record["metrics"] = {
            k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in metrics.items()
        }
    return record


def read_metrics(run: str | Path) -> Any:
    """Return the metrics of a run as a table, one row per step or evaluation.

    Args:
        run: The run's folder or its `metrics.jsonl`; it may still be written to.

    Returns:
        A pandas or polars `DataFrame` where one of them is installed, else a dictionary of NumPy
        arrays. Columns: `kind`, `step`, `epoch`, `micro_step`, `items`, `time` (seconds since the
        epoch of Unix) and one float column per metric, NaN where a row has none.

    Raises:
        RunError: There is no metric log.
    """
    import numpy as np

    records = [r for r in read_records(Path(run)) if "metrics" in r]
    axes = ("kind", "step", "epoch", "micro_step", "items", "time")
    names = list(dict.fromkeys(name for r in records for name in r["metrics"]))
    columns: dict[str, Any] = {
        axis: np.array([math.nan if r.get(axis) is None else r[axis] for r in records])
        for axis in axes
    }
    for name in names:
        columns[name] = np.array([r["metrics"].get(name, math.nan) for r in records], dtype=float)
    for library in ("pandas", "polars"):
        try:
            module = __import__(library)
        except ImportError:
            continue
        return module.DataFrame(columns)
    return columns


class Follower:
    """Feeds one tracker from the metric log, in a thread of its own.

    What the tracker raises is retried a few times with growing pauses; then it is parked with one
    warning. The log keeps everything either way.

    Args:
        name: The tracker's name, for messages.
        tracker: Who is fed.
        path: The metric log.
        params: The run's settings, handed over first.
        resumed_at_step: Optimizer step that a resumed run goes on from. A tracker with a method
            `rewind(step)` drops what it has after it.
        poll_s: Pause between two looks at the log, seconds.
    """

    NUM_TRIES = 4

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        path: Path,
        params: Mapping[str, Any],
        *,
        resumed_at_step: int | None = None,
        poll_s: float = 0.5,
    ) -> None:
        self.name = name
        self.parked_by: str | None = None
        """Why the tracker was given up, if it was."""
        self._tracker = tracker
        self._path = path
        self._params = params
        self._resumed_at_step = resumed_at_step
        self._poll_s = poll_s
        # How far it has come survives a crash; the log says what comes next.
        self._cursor = path.with_name(f".{name.replace(':', '-')}.cursor")
        self._offset = 0
        self._status: str | None = None
        self._wake = threading.Event()
        self._given_up = threading.Event()
        # A tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"dovetail-{name}", daemon=True)

    def start(self) -> None:
        """Begin to follow, from where this tracker had come to before a resume."""
        with suppress(OSError, ValueError):  # no cursor yet, or a damaged one
            self._offset = min(int(self._cursor.read_text()), self._path.stat().st_size)
        self._thread.start()

    def end(self, status: str) -> None:
        """Say that the log is complete, so that the tracker gets the rest and is closed."""
        self._status = status
        self._wake.set()

    def finish(self, status: str, timeout_s: float) -> None:
        """Hand over the rest and close the tracker, waiting at most `timeout_s` seconds."""
        self.end(status)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up.set()
            self._park(f"did not finish within {timeout_s:g} s")

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as err:  # the log itself was taken away
            self._park(f"{type(err).__name__}: {err}")

    def _follow(self) -> None:
        rewind = getattr(self._tracker, "rewind", None)
        if self._resumed_at_step is not None and rewind is not None:
            self._try(lambda: rewind(self._resumed_at_step))
        self._try(lambda: self._tracker.log_params(self._params))
        is_last = False
        while not is_last and self.parked_by is None:
            self._wake.wait(self._poll_s)
            # Looked at before the log is read, so that nothing written before it is missed.
            is_last = self._status is not None
            self._feed()
        if self.parked_by is None:
            self._try(lambda: self._tracker.close(self._status or "failed"))

    def _feed(self) -> None:
        start = self._offset
        with self._path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n") or self._given_up.is_set():
                    break
                record = parse_record(line) or {}
                metrics = record.get("metrics")
                if metrics:
                    self._try(lambda m=metrics, s=record["step"]: self._tracker.log(m, s))
                if self.parked_by is not None:
                    break
                self._offset += len(line)
        if self._offset != start:
            # A full disk costs no more than a record that the tracker is given twice.
            with suppress(OSError):
                beside = self._cursor.with_name(f"{self._cursor.name}.partial")
                beside.write_text(str(self._offset), encoding="ascii")
                beside.replace(self._cursor)

    def _try(self, call: Any) -> None:
        if self.parked_by is not None:
            return
        for attempt in range(self.NUM_TRIES):
            try:
                call()
                return
            except BaseException as err:  # also a tracker that calls sys.exit
                reason = f"{type(err).__name__}: {err}"
                self._given_up.wait(0.05 * 4**attempt if attempt + 1 < self.NUM_TRIES else 0)
        self._park(reason)

    def _park(self, reason: str) -> None:
        if self.parked_by is not None:
            return
        self.parked_by = reason
        found = f"is parked: {reason}"
        hint = f"The run goes on; every record stands in {self._path.name}."
        warnings.warn(build_message(f"tracker {self.name!r}", found, action=hint), stacklevel=3)


class Tracking:
    """The metric log of a run and the followers that feed its trackers, opened and closed together.

    Args:
        directory: The run's folder.
        trackers: Trackers by name.
        params: The run's settings, handed to each tracker first.
        resumed_at: Optimizer step and length of the log in bytes that a resumed run goes on from.
    """

    FLUSH_S = 30.0
    """Seconds all trackers together get at the end of a run; who needs longer is parked."""

    def __init__(
        self,
        directory: Path,
        trackers: Mapping[str, Tracker],
        params: Mapping[str, Any],
        resumed_at: tuple[int, int] | None = None,
    ) -> None:
        self.log = MetricLog(directory)
        self.status = "failed"
        """How the run ended; whoever completes it says so."""
        step, size_bytes = resumed_at or (None, None)
        if size_bytes is not None:
            self.log.rewind(size_bytes)
        self._followers = [
            Follower(name, tracker, self.log.path, params, resumed_at_step=step)
            for name, tracker in trackers.items()
        ]

    def __enter__(self) -> Tracking:
        for follower in self._followers:
            follower.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(value, KeyboardInterrupt):
            self.status = "interrupted"
        record: dict[str, Any] = {"kind": "end", "status": self.status, "time": time.time()}
        if value is not None:
            record["error"] = f"{type(value).__name__}: {value}"
        self.log.write(record)
        for follower in self._followers:
            follower.end(self.status)
        deadline_s = time.monotonic() + self.FLUSH_S
        for follower in self._followers:
            follower.finish(self.status, max(0.0, deadline_s - time.monotonic()))
        self.log.close()
