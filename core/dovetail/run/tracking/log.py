"""The metric log: one durable file that is the truth of a run.

Each record is one JSON object on a line of `metrics.jsonl`, written whole in the training thread
before anybody else sees it, so that it survives a `kill -9` of the process. Trackers never stand
in the loop: followers read the file and feed them.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.errors import RunError, build_message
from dovetail.run.tracking.lock import RUN, FolderLock

LOG_NAME = "metrics.jsonl"

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class MetricLog:
    """Appends records to a run's `metrics.jsonl`; any thread may write.

    Args:
        directory: The run's folder. An existing log is continued; a last line that was torn by a
            crash is cut off.

    Raises:
        RunError: The file cannot be opened for writing, or another process writes it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME
        self._run_lock = FolderLock(directory, RUN)
        try:
            self._run_lock.acquire()
            repair(self.path)
            # Unbuffered: each record is handed to the kernel at once and outlives the process.
            self._file = self.path.open("ab", buffering=0)
        except OSError as err:
            self._run_lock.release()
            found = f"cannot be written: {err.strerror}"
            hint = "Choose another run.dir."
            where = f"metric log {str(self.path)!r}"
            raise RunError(build_message(where, found, action=hint)) from err
        self._size_bytes = os.fstat(self._file.fileno()).st_size
        self._write_lock = threading.Lock()
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
            line = _encode(self._spell_non_finite(record, record.get("step")))
        data = f"{line}\n".encode()
        with self._write_lock:
            try:
                self._write_whole(data)
            except OSError as err:
                self._lose(err)

    def _write_whole(self, data: bytes) -> None:
        num_written = self._file.write(data)
        try:
            while num_written < len(data):  # as on a disk that is about to be full
                num_written += self._file.write(data[num_written:])
        except OSError:
            # No other line must follow on the beginning of this one.
            self._file.truncate(self._size_bytes)
            raise
        self._size_bytes += len(data)

    def _lose(self, err: OSError) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            text = f"cannot be written: {err.strerror}; the run goes on without its records"
            warnings.warn(build_message(f"metric log {str(self.path)!r}", text), stacklevel=3)

    def _spell_non_finite(
        self, record: Mapping[str, Any], step: Any, *, is_metrics: bool = False
    ) -> dict[str, Any]:
        spelled: dict[str, Any] = {}
        for key, value in record.items():
            if isinstance(value, Mapping):
                spelled[key] = self._spell_non_finite(value, step, is_metrics=key == "metrics")
            elif isinstance(value, float) and not math.isfinite(value):
                spelled[key] = spell(value)
                if is_metrics and key not in self._seen_non_finite:
                    self._seen_non_finite.add(key)
                    when = "" if step is None else f", at step {step}"
                    text = f"metric {key!r} is {value} for the first time{when}"
                    warnings.warn(text, stacklevel=4)
            else:
                spelled[key] = value
        return spelled

    @property
    def num_lost(self) -> int:
        """Records that could not be written."""
        return self._num_lost

    def tell(self) -> int:
        """Return the length of the log in bytes, for a checkpoint."""
        return self._size_bytes

    def rewind(self, size_bytes: int) -> None:
        """Drop everything after the first `size_bytes`, as a resumed run writes it again."""
        with self._write_lock:
            # A torn last line may have been cut off since; truncating to more would add zeros.
            self._size_bytes = min(size_bytes, self._size_bytes)
            self._file.truncate(self._size_bytes)

    def close(self) -> None:
        """Close the file, and say how many records a full disk has cost."""
        if self._file.closed:
            return
        self._file.close()
        self._run_lock.release()
        if self._num_lost:
            text = f"lacks {self._num_lost} records that could not be written"
            warnings.warn(build_message(f"metric log {str(self.path)!r}", text), stacklevel=3)


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
