"""A follower reads the metric log and feeds one tracker, from a thread of its own."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from dovetail.run.tracking.calls import CallReader
from dovetail.run.tracking.cursor import Cursor, Position
from dovetail.run.tracking.reading import parse_record
from dovetail.types import Tracker

_CURSOR_S = 1.0
"""Seconds between two notes of how far a tracker has come."""


class Follower:
    """Feeds one tracker from the metric log, and keeps how far it has come.

    What the tracker raises is retried a few times with growing pauses. Then it is parked: left in
    peace for a while that grows too, and tried again. The log keeps everything either way.

    Args:
        name: The tracker's name.
        tracker: Who is fed.
        path: The metric log.
        poll_s: Pause between two looks at the log, seconds.
        calls_per_s: Calls per second that the tracker gets at most.
        on_parked: Called once with the reason, when the tracker is parked for the first time.
        on_refused: Called with each file that the tracker refuses while it takes the rest, and why.
    """

    NUM_TRIES = 4
    PAUSE_S = 0.05
    """Before the second try; each further pause is four times as long."""
    PARKED_S = 30.0
    """Before a parked tracker is tried again; twice as long each time, `PARKED_MAX_S` at most."""
    PARKED_MAX_S = 600.0

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        path: Path,
        *,
        poll_s: float = 0.5,
        calls_per_s: float | None = None,
        on_parked: Callable[[str], None] | None = None,
        on_refused: Callable[[str, str], None] | None = None,
    ) -> None:
        self.name = name
        self.parked_by: str | None = None
        """Why the tracker is parked; `None` while it takes what it is given."""
        self._tracker = tracker
        self._calls = CallReader(path, tracker)
        self._path = path
        self._poll_s = poll_s
        self._min_pause_s = 0.0 if calls_per_s is None else 1.0 / calls_per_s
        self._on_parked = on_parked
        self._on_refused = on_refused
        self._was_parked = False
        self._cursor = Cursor(path.parent, name)
        self._offset = 0
        self._end = 0
        """Place of the log behind what was tried last."""
        self._untaken: dict[str, str] = {}
        """Files at that place that were tried in vain, and why."""
        self._noted_s = -math.inf
        self._called_s = -math.inf
        self._status = "failed"
        self._given_up_by = ""
        self._is_complete = threading.Event()
        self._is_given_up = threading.Event()
        # A tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"dovetail-{name}", daemon=True)

    def start(self) -> None:
        """Begin to follow, from where this tracker had come to before."""
        self._thread.start()

    def end(self, status: str) -> None:
        """Say that the log is complete, so that the tracker gets the rest and is closed."""
        self._status = status
        self._is_complete.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait at most `timeout_s` seconds; return whether it is over, well or not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def give_up(self, reason: str) -> None:
        """Stop following after the call that is under way, if it ever ends."""
        self._given_up_by = reason
        self._is_given_up.set()
        self._park(reason)

    def _run(self) -> None:
        try:
            if self._follow():
                self._finish()
        except BaseException as err:  # the log itself was taken away
            self._park(f"{type(err).__name__}: {err}")

    def _follow(self) -> bool:
        """Hand over everything until the log is complete; return whether the tracker took it."""
        work: Callable[[], bool] = self._recover
        pause_s = self.PARKED_S
        while not self._is_given_up.is_set():
            # Looked at before the log is read, so that nothing written before it is missed.
            is_last = self._is_complete.is_set()
            start = self._offset
            is_done = work()
            if is_done or self._offset != start:
                pause_s = self.PARKED_S
            if is_done and work == self._recover:
                work = self._feed
            elif is_done and not is_last:
                self._is_complete.wait(self._poll_s)
            elif is_last:
                return is_done or bool(self._untaken)
            else:
                self._is_complete.wait(pause_s)
                pause_s = min(2 * pause_s, self.PARKED_MAX_S)
        return False

    def _recover(self) -> bool:
        """Find where to go on, and have the tracker drop what it will be given again."""
        position, size_bytes = self._cursor.read(), self._path.stat().st_size
        offset = min(position.offset, size_bytes)
        if self._cursor.exists() and not position.is_clean:
            rewind: Callable[[int], None] | None = getattr(self._tracker, "rewind", None)
            is_idempotent = bool(getattr(self._tracker, "is_idempotent", False))
            if is_idempotent and not (position.needs_rewind and rewind):
                offset = 0
            elif rewind is not None:
                start, lowest, step = last_steps_before(self._path, offset)
                if offset < size_bytes:
                    # It may have taken more than the cursor tells of: from that step on, again.
                    offset, step = (start if lowest > 0 else 0), lowest - 1
                reason = self._try(lambda: rewind(step))
                if reason is not None:
                    self._park(reason)
                    return False
        self._offset = offset
        self._note()
        return True

    def _feed(self) -> bool:
        """Hand over what the log holds; return whether the tracker has taken all of it."""
        offset = self._offset
        self._untaken.clear()
        for call in self._calls.read(offset):
            if self._is_given_up.is_set():
                break
            reason = self._try(call.act) if call.act is not None else None
            if reason is not None and not call.file:
                self._untaken.clear()
                self._note()
                self._park(reason)
                return False
            self._end = call.end
            if reason is not None:
                # Whether the file is to blame, or the tracker's whole world, the next call tells.
                self._untaken[call.file] = reason
            elif call.act is not None or not self._untaken:
                self._pass()
                self._note(at_most_every_s=_CURSOR_S)
        if self._offset != offset:
            self._note()
        return not self._untaken and not self._is_given_up.is_set()

    def _finish(self) -> None:
        reason = self._try(lambda: self._tracker.close(self._status))
        if reason is not None:
            self._park(reason)
            return
        if self._untaken:
            self._pass()
        self._note(is_clean=True)

    def _pass(self) -> None:
        """Go on behind what was tried last: the tracker takes whatever it can take."""
        self._offset = self._end
        if self._on_refused is not None:
            for file, why in self._untaken.items():
                self._on_refused(file, why)
        self._untaken.clear()

    def _note(self, at_most_every_s: float = 0.0, *, is_clean: bool = False) -> None:
        now_s = time.monotonic()
        if now_s - self._noted_s >= at_most_every_s:
            self._noted_s = now_s
            self._cursor.write(Position(self._offset, is_clean))

    def _try(self, act: Callable[[], None]) -> str | None:
        """Call the tracker until it takes it; return why it does not."""
        reason = None
        for attempt in range(self.NUM_TRIES):
            if attempt:
                self._is_given_up.wait(self.PAUSE_S * 4 ** (attempt - 1))
            self._is_given_up.wait(max(0.0, self._called_s + self._min_pause_s - time.monotonic()))
            if self._is_given_up.is_set():
                return reason or self._given_up_by
            self._called_s = time.monotonic()
            try:
                act()
            except BaseException as err:  # also a tracker that calls sys.exit
                reason = f"{type(err).__name__}: {err}"
            else:
                if not self._is_given_up.is_set():
                    self.parked_by = None
                return None
        return reason

    def _park(self, reason: str) -> None:
        if self.parked_by is not None and self._is_given_up.is_set():
            return
        self.parked_by = reason
        if not self._was_parked and self._on_parked is not None:
            self._was_parked = True
            self._on_parked(reason)


def last_steps_before(path: Path, end: int) -> tuple[int, int, int]:
    """Return where the last steps before a place of the log begin, the lowest and the highest.

    Mostly it is one step with all its records, that of its evaluation among them. A record may
    also come late, from another thread, or early, as the figure of a window that is still open:
    steps that stand mixed are taken together. So only earlier steps stand in front of the place
    that is returned and none of them behind it: whoever rewinds to the step before the lowest and
    is fed from there has everything once. Where there is no record, it is the beginning and step 0.
    """
    starts, lowest, highest = array("q"), array("q"), array("q")
    position = 0
    with path.open("rb") as file:
        for line in file:
            step = (parse_record(line) or {}).get("step")
            if isinstance(step, int):
                start, low, high = position, step, step
                while highest and highest[-1] >= step:
                    start = starts.pop()
                    low, high = min(low, lowest.pop()), max(high, highest.pop())
                if start < end:
                    starts.append(start)
                    lowest.append(low)
                    highest.append(high)
            position += len(line)
    return (starts[-1], lowest[-1], highest[-1]) if starts else (0, 0, 0)
