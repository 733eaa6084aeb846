"""The metric log of a run together with those who feed its trackers."""

from __future__ import annotations

import os
import shlex
import signal
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from dovetail.errors import build_message
from dovetail.run.tracking.cursor import rewind_cursors
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import FOLLOWERS, FolderLock
from dovetail.run.tracking.log import LOG_NAME, MetricLog
from dovetail.types import Tracker

FLUSH_S = 30.0
"""Seconds all trackers together get at the end of a run, by default."""


def open_log(
    directory: Path, resumed_at: tuple[int, int] | None = None, *, patience_s: float = FLUSH_S
) -> MetricLog:
    """Open the metric log of a run, a resumed one's at its checkpoint.

    Args:
        directory: The run's folder.
        resumed_at: Optimizer step and length of the log in bytes that a resumed run goes on from.
        patience_s: How long a crashed run's followers may still take to finish, seconds.

    Raises:
        RunError: The log cannot be written, or another process writes it.
    """
    log = MetricLog(directory)
    end_followers(directory, patience_s)
    if resumed_at is not None:
        log.rewind(resumed_at[1])
        rewind_cursors(directory, log.tell())
    return log


def end_followers(directory: Path, patience_s: float) -> None:
    """Wait for the followers that a crashed run has left; end them if they do not by themselves.

    The caller holds the lock of the run, so that nobody else begins to follow.
    """
    lock = FolderLock(directory, FOLLOWERS)
    with suppress(OSError):
        if not lock.try_acquire(patience_s):
            holder = lock.holder()
            if holder is not None and holder != os.getpid():
                os.kill(holder, getattr(signal, "SIGKILL", signal.SIGTERM))
            lock.try_acquire(5.0)
        lock.release()


class Followers(Protocol):
    """Followers in another place than this process."""

    def start(self) -> None:
        """Begin to follow."""

    def end(self, status: str) -> None:
        """Say that the log is complete."""

    def join(self, timeout_s: float) -> dict[str, str]:
        """Wait at most `timeout_s` seconds; return why which tracker is parked."""
        ...


class Tracking:
    """The metric log of a run and the followers that feed its trackers, opened and closed together.

    Args:
        log: The metric log.
        trackers: Trackers by name that are fed from threads of this process.
        params: The run's settings, the first record.
        elsewhere: Those that are fed from another process.
        config_dir: Folder that relative paths in the settings are meant from, for a later reader.
        flush_s: Seconds all trackers together get at the end; who needs longer is parked.
        calls_per_s: Calls per second that a tracker gets at most.
    """

    def __init__(
        self,
        log: MetricLog,
        trackers: Mapping[str, Tracker],
        params: Mapping[str, Any],
        elsewhere: Followers | None = None,
        *,
        config_dir: Path | None = None,
        flush_s: float = FLUSH_S,
        calls_per_s: float | None = None,
    ) -> None:
        self.log = log
        self.status = "failed"
        """How the run ended; whoever completes it says so."""
        self.parked: dict[str, str] = {}
        """Trackers that lack records, and why; once the log is closed."""
        self._params = params
        self._config_dir = config_dir
        self._elsewhere = elsewhere
        self._flush_s = flush_s
        self._followers = [
            Follower(
                name,
                tracker,
                log.path,
                calls_per_s=calls_per_s,
                on_parked=partial(warn_parked, log.path.parent, name),
                on_refused=partial(warn_refused, name),
            )
            for name, tracker in trackers.items()
        ]

    def add_file(
        self, kind: Literal["figure", "artifact", "graph"], name: str, path: Path, step: int
    ) -> None:
        """Refer to a picture, a graph, or any file or folder, of the run's folder.

        Args:
            kind: What it is.
            name: What it is called.
            path: Where it lies in the run's folder.
            step: Optimizer step that it shows.
        """
        file = path.relative_to(self.log.path.parent).as_posix()
        axes = {"step": step, "time": time.time()}
        self.log.write({"kind": kind, **axes, "name": name, "file": file})

    def __enter__(self) -> Tracking:
        record = {"kind": "params", "time": time.time(), "params": dict(self._params)}
        if self._config_dir is not None:
            record["config_dir"] = str(self._config_dir.resolve())
        self.log.write(record)
        for follower in self._followers:
            follower.start()
        if self._elsewhere is not None:
            self._elsewhere.start()
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
        try:
            self._end_followers("completed" if self.status == "stopped early" else self.status)
        finally:
            self.log.close()

    def _end_followers(self, status: str) -> None:
        for follower in self._followers:
            follower.end(status)
        if self._elsewhere is not None:
            self._elsewhere.end(status)
        deadline_s = time.monotonic() + self._flush_s
        for follower in self._followers:
            if not follower.join(max(0.0, deadline_s - time.monotonic())):
                follower.give_up(late(self._flush_s))
            if follower.parked_by is not None:
                self.parked[follower.name] = follower.parked_by
        if self._elsewhere is not None:
            self.parked |= self._elsewhere.join(max(0.0, deadline_s - time.monotonic()))


def warn_parked(directory: Path, name: str, reason: str) -> None:
    """Say that a tracker is parked, and how it gets the rest."""
    hint = (
        f"The run goes on; every record stands in {LOG_NAME}, and what the tracker lacks in the "
        f"end it gets by: {shlex.join(['dovetail', 'log', 'sync', str(directory)])}"
    )
    text = build_message(f"tracker {name!r}", f"is parked: {reason}", action=hint)
    warnings.warn(text, stacklevel=2)


def warn_refused(name: str, file: str, reason: str) -> None:
    """Say that a tracker takes everything but a file."""
    text = build_message(f"tracker {name!r}", f"does not take {file}: {reason}")
    warnings.warn(text, stacklevel=2)


def late(flush_s: float) -> str:
    """Return why a tracker is given up that is too slow at the end of a run."""
    return f"did not finish within {flush_s:g} s (log.flush_s)"
