"""The metric log: one durable file that is the truth of a run.

Each record is one JSON object on a line of `metrics.jsonl`, written whole in the training thread
before anybody else sees it, so that it survives a `kill -9` of the process. Trackers never stand
in the loop: `followers` read the file and feed them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dovetail.errors import RunError, build_message

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
