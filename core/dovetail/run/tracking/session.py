"""The metric log of a run together with the followers of its trackers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.log import MetricLog
from dovetail.types import Tracker


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
        if resumed_at is not None:
            self.log.rewind(resumed_at[1])
        self._followers = [
            Follower(name, tracker, self.log.path, params, is_resumed=resumed_at is not None)
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
