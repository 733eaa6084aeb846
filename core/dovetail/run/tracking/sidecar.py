"""Followers in a process of their own, where no tracker shares the training's interpreter.

The process lives as long as the training: it sees the end of its standard input, and that its
parent is another. After a crash it hands over what the log holds and ends, within a bounded time.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import PluginError, RunError, build_message, rebuild_error
from dovetail.run.tracking.session import late, warn_parked, warn_refused

START_S = 300.0
"""Seconds the trackers get to be made: a login over a slow network takes its time."""

END_S = 2.0
"""Seconds the process gets to end after its last word."""

_WHERE = "process of the trackers"

# The import path comes first: this package may be importable by it alone, and whatever lies in the
# current folder must not stand in for a module of Python.
_BOOT = (
    "import sys\n"
    "sys.path[:] = [entry for entry in sys.path if entry]\n"
    "import json\n"
    "request = json.loads(sys.stdin.readline())\n"
    "sys.path[:] = request['path']\n"
    "from dovetail.run.tracking.sidecar_process import main\n"
    "main(request)\n"
)


@dataclass(frozen=True)
class SidecarRequest:
    """What the process needs to make the trackers, all of it JSON-able."""

    directory: str
    """The run's folder."""
    run_name: str
    params: Mapping[str, Any]
    trackers: Mapping[str, Mapping[str, Any]]
    """Options tables by name."""
    config_dir: str | None = None
    """Folder that relative paths in the tables are meant from."""
    wrappers: tuple[str, ...] = ()
    autoload: bool | None = None
    allow: tuple[str, ...] | None = None
    flush_s: float = 30.0
    calls_per_s: float | None = None


class Sidecar:
    """The training's end of the process that feeds the trackers.

    Args:
        request: What it shall do. The trackers are made at once, and fed from `start` on.

    Raises:
        DovetailError: A tracker cannot be made; the error is the one that making it raised.
        RunError: The process does not start.
    """

    def __init__(self, request: SidecarRequest) -> None:
        self._request = request
        self._directory = Path(request.directory)
        self.history: list[list[dict[str, Any]]] = []
        """How the hook calls went, one per tracker: the plugins with seconds and results."""
        self._parked: dict[str, str] = {}
        self._warned: set[str] = set()
        self._is_done = False
        self._listener = threading.Thread(
            target=self._listen, name="dovetail-sidecar-events", daemon=True
        )
        paths = [os.path.abspath(path) if path else "" for path in sys.path]
        message = {**asdict(request), "path": paths, "log_levels": find_log_levels()}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        except OSError as err:
            found = f"cannot be started: {err.strerror}"
            hint = 'Set log.follow = "thread".'
            raise RunError(build_message(_WHERE, found, action=hint)) from err
        try:
            self._tell(message)
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def start(self) -> None:
        """Begin to follow the log."""
        self._listener.start()
        self._tell({"follow": True})

    def end(self, status: str) -> None:
        """Say that the log is complete."""
        self._tell({"end": status})

    def join(self, timeout_s: float) -> dict[str, str]:
        """Wait at most `timeout_s` seconds for the trackers; return why which one is parked."""
        # A little longer than the process itself waits, so that it can say who is late.
        self._listener.join(timeout_s + END_S)
        try:
            if self._is_done:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_S)
            else:
                is_late = self._listener.is_alive()
                lost = late(self._request.flush_s) if is_late else self._describe()
                for name in self._request.trackers:
                    self._parked.setdefault(name, lost)
                    self._warn(name, self._parked[name])
        finally:
            self.kill()
        return dict(self._parked)

    def kill(self) -> None:
        """End the process at once, if it is still there."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # what was not sent yet
            self._process.stdin.close()
        # A pipe that is read cannot be closed, and a process that a tracker has forked may hold its
        # other end open.
        if self._listener.is_alive():
            self._listener.join(END_S)
        if not self._listener.is_alive():
            self._process.stdout.close()

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # the process is gone, and whoever waits for it will notice
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _events(self) -> Iterable[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # What the interpreter itself runs before our code may print too.
            if line.startswith('{"event": '):
                yield json.loads(line)

    def _await_ready(self) -> None:
        timer = threading.Timer(START_S, self._process.kill)
        timer.start()
        try:
            for event in self._events():
                if event["event"] == "refused":
                    raise rebuild_error(event["kind"], event["message"], _WHERE, PluginError)
                if event["event"] == "ready":
                    self.history = event["history"]
                    return
                self._hear(event)
        finally:
            timer.cancel()
        raise RunError(build_message(_WHERE, self._describe(), "trackers that start"))

    def _listen(self) -> None:
        with suppress(ValueError, OSError):  # the pipe was closed, or the process died in a word
            for event in self._events():
                self._hear(event)
                if self._is_done:
                    return

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "parked":
            self._warn(event["name"], event["reason"])
        elif event["event"] == "refused file":
            warn_refused(event["name"], event["file"], event["reason"])
        elif event["event"] == "log":
            logging.getLogger(event["name"]).log(event["level"], "%s", event["message"])
        elif event["event"] == "warning":
            category = getattr(builtins, event["category"], UserWarning)
            warnings.warn(event["message"], category, stacklevel=3)
        elif event["event"] == "done":
            self._parked |= event["parked"]
            self._is_done = True

    def _warn(self, name: str, reason: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warn_parked(self._directory, name, reason)

    def _describe(self) -> str:
        try:
            return f"their process ended with status {self._process.wait(END_S)}"
        except subprocess.TimeoutExpired:
            return "their process does not answer any more"


def find_log_levels() -> dict[str, int]:
    """Return the levels of all loggers that have one, the root's as ""; none without a handler."""
    root = logging.getLogger()
    if not root.hasHandlers():
        return {}
    loggers = [root, *logging.Logger.manager.loggerDict.values()]
    named = [logger for logger in loggers if isinstance(logger, logging.Logger)]
    return {"" if logger is root else logger.name: logger.level for logger in named if logger.level}
