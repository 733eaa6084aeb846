"""Locks of a run's folder: one process writes its log, one feeds its trackers."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from dovetail.errors import RunError, build_message

try:
    import fcntl
except ImportError:  # Windows has other locks; two processes on one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

RUN = "run"
"""Who writes the metric log."""
FOLLOWERS = "followers"
"""Who feeds the trackers in a process of its own."""

_held: set[str] = set()
"""Locks of this process, which the kernel would grant it again."""


class FolderLock:
    """A lock that the kernel frees when its process ends, however it ends.

    It belongs to the process that took it: a forked data worker neither holds nor frees it.

    Args:
        directory: The run's folder.
        purpose: What is locked, `RUN` or `FOLLOWERS`.
    """

    def __init__(self, directory: Path, purpose: str) -> None:
        self.path = directory.resolve() / f".{purpose}.lock"
        self._file: IO[bytes] | None = None

    def try_acquire(self, timeout_s: float = 0.2) -> bool:
        """Take the lock, waiting at most `timeout_s` seconds; return whether it was free.

        Raises:
            OSError: The file cannot be written.
        """
        key = str(self.path)
        deadline_s = time.monotonic() + timeout_s
        while key in _held or not self._take():
            if time.monotonic() >= deadline_s:
                return False
            # Whoever looks at the lock holds it for a moment.
            time.sleep(0.02)
        _held.add(key)
        return True

    def _take(self) -> bool:
        file = self.path.open("ab+", buffering=0)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError:
            pass  # a file system without locks, as some network ones are
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        self._file = file
        return True

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: Another process holds it.
            OSError: The file cannot be written.
        """
        if not self.try_acquire():
            where = f"run folder {str(self.path.parent)!r}"
            found = f"is in use by process {self.holder() or '(unknown)'}"
            hint = "Wait for it to end, or end it."
            raise RunError(build_message(where, found, "one process per run", hint))

    def holder(self) -> int | None:
        """Return the id of the process that took the lock last."""
        with suppress(OSError, ValueError):
            return int(self.path.read_bytes())
        return None

    def release(self) -> None:
        """Free the lock, if it is held."""
        if self._file is not None:
            _held.discard(str(self.path))
            self._file.close()
            self._file = None


def is_locked(directory: Path, purpose: str = RUN) -> bool:
    """Return whether a process holds a lock of a run's folder; on Windows it is never known."""
    path = FolderLock(directory, purpose).path
    # Opening and closing the file would free a lock of this very process.
    if str(path) in _held:
        return True
    if fcntl is None:
        return False
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or no locks
        return False
    return False
