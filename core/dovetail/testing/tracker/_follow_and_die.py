"""A process that follows a metric log and is killed in the middle of it.

Reads a request as JSON from stdin. The tracker has acknowledged the first records, and was given
a few more that no cursor tells of, when the process is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Deadly:
    """Hands everything on to a tracker, and kills the process at one of its records."""

    def __init__(self, tracker: Any, num_before: int, num_after: int) -> None:
        self._tracker = tracker
        self._num_before = num_before
        self._num_after = num_after
        self._num_rows = 0
        self.is_written = threading.Event()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._tracker, name)
        return self._log_many if name == "log_many" else member

    def log(self, metrics: Any, step: int) -> None:
        """Record, and die of it."""
        self._hand_over(lambda rows: self._tracker.log(*rows[0]), [(metrics, step)])

    def _log_many(self, rows: Any) -> None:
        self._hand_over(self._tracker.log_many, rows)

    def _hand_over(self, take: Callable[[Any], None], rows: Any) -> None:
        if self._num_rows >= self._num_before:
            # All that follows is read in one go, so that the cursor stays where it is.
            self.is_written.wait()
        num_left = self._num_before + self._num_after - self._num_rows
        take(rows[:num_left])
        self._num_rows += len(rows)
        if len(rows) >= num_left:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def main() -> None:
    """Follow the log of a request until the end."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    from dovetail.run.tracking import MetricLog
    from dovetail.run.tracking.cursor import Cursor
    from dovetail.run.tracking.follower import Follower
    from dovetail.testing.processes import make_registry
    from dovetail.types import RunInfo

    directory = Path(request["directory"])
    info = RunInfo(request["run_name"], directory.name, directory, request["params"])
    registry, options = make_registry(request)
    tracker = registry.log(request["name"], info, options)
    records, num_before = request["records"], request["num_before"]
    log = MetricLog(directory)
    log.write({"kind": "params", "time": time.time(), "params": request["params"]})
    deadly: Any = Deadly(tracker, num_before, request["num_after"])
    follower = Follower("followed", deadly, log.path, poll_s=0.01)
    follower.start()
    for record in records[:num_before]:
        log.write(record)
    cursor, size = Cursor(directory, "followed"), log.tell()
    wait_for(follower, lambda: cursor.read().offset == size)
    for record in records[num_before:]:
        log.write(record)
    deadly.is_written.set()
    wait_for(follower, lambda: False)


def wait_for(follower: Any, is_done: Callable[[], bool]) -> None:
    """Wait until something is done; end the process if the tracker is given up before."""
    deadline_s = time.monotonic() + 60
    while not is_done():
        if follower.parked_by is not None:
            sys.exit(follower.parked_by)
        if time.monotonic() > deadline_s:
            sys.exit("the tracker did not take the records within 60 s")
        time.sleep(0.005)


if __name__ == "__main__":
    main()
