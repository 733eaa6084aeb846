"""Followers: they read the metric log and feed the trackers, each from a thread of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dovetail.errors import build_message
from dovetail.run.tracking.reading import parse_record
from dovetail.types import Tracker


class Follower:
    """Feeds one tracker from the metric log, in a thread of its own.

    What the tracker raises is retried a few times with growing pauses; then it is parked with one
    warning. The log keeps everything either way.

    Args:
        name: The tracker's name, for messages.
        tracker: Who is fed.
        path: The metric log.
        params: The run's settings, handed over first.
        is_resumed: Whether the run was resumed, so that a tracker may have been fed before. One
            with a method `rewind(step)` drops what it will be given again.
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
        is_resumed: bool = False,
        poll_s: float = 0.5,
    ) -> None:
        self.name = name
        self.parked_by: str | None = None
        """Why the tracker was given up, if it was."""
        self._tracker = tracker
        self._path = path
        self._params = params
        self._is_resumed = is_resumed
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
        self._is_resumed |= self._cursor.exists()
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
        if self._is_resumed and rewind is not None:
            start, step = _last_step_before(self._path, self._offset)
            if self._offset < self._path.stat().st_size:
                # It may have taken more than the cursor tells of: from that step on, all again.
                self._offset, step = start, step - 1
            self._try(lambda: rewind(step))
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


def _last_step_before(path: Path, end: int) -> tuple[int, int]:
    """Return where the records of the last step before a place of the log begin, and that step.

    A step may have several records, that of its evaluation among them: whoever rewinds to the step
    before and is fed from here has everything once. Where there is no record, it is the beginning
    and step 0.
    """
    start, last_step = 0, 0
    position = 0
    with path.open("rb") as file:
        for line in file:
            if position >= end:
                break
            step = (parse_record(line) or {}).get("step")
            if isinstance(step, int) and step != last_step:
                start, last_step = position, step
            position += len(line)
    return start, last_step
