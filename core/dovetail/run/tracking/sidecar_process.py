"""What runs in the process of the trackers."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from dovetail.errors import DovetailError
from dovetail.registry.admission import Admission
from dovetail.registry.calling import Registry
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import FOLLOWERS, FolderLock
from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.session import late
from dovetail.types import RunInfo, Tracker

_NICENESS = 5
"""Whoever trains comes first, where both want the same core."""


class Channel:
    """The line to the training process: one JSON object on each line, both ways."""

    def __init__(self) -> None:
        # What a tracker prints must not stand between the messages.
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._parent = os.getppid()
        self._heard: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._is_following = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(ValueError):  # the training died in the middle of a word
            for line in sys.stdin:
                message = json.loads(line)
                self._is_following |= "follow" in message
                self._heard.put(message)
        if not self._is_following:
            # A login may wait for ever, and what it is for is gone.
            os._exit(0)
        self._heard.put(None)

    def say(self, event: str, /, **fields: Any) -> None:
        """Send an event; a training that is gone misses nothing."""
        with self._lock, suppress(OSError):
            self._out.write(json.dumps({"event": event, **fields}) + "\n")

    def hear(self, name: str) -> Any:
        """Wait for what the training says under a name; `None` when it is gone."""
        while True:
            try:
                message = self._heard.get(timeout=1.0)
            except Empty:
                # A process that the training has forked may hold its end of the pipe open.
                if os.getppid() == self._parent:
                    continue
                return None
            if message is None or name in message:
                return None if message is None else message[name]


class Forwarder(logging.Handler):
    """Hands what is logged here to the training, whose handlers know what to do with it.

    Args:
        channel: The line to the training.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, its traceback too."""
        fields = {"level": record.levelno, "message": self.format(record)}
        self._channel.say("log", name=record.name, **fields)


def main(request: Mapping[str, Any]) -> None:
    """Make the trackers, feed them until the log is complete, and end with the training."""
    # The terminal's signals are the training's: this process ends when that one does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    channel = Channel()
    for name, level in request["log_levels"].items():
        logging.getLogger(name).setLevel(level)
    warnings.showwarning = partial(_tell_warning, channel)
    if request["log_levels"]:  # else the training has not set up logging either
        logging.getLogger().addHandler(Forwarder(channel))
    try:
        trackers = _make_trackers(request, channel)
        if trackers is not None and channel.hear("follow"):
            _follow(request, trackers, channel)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of trackers that hang, or of their libraries, must not keep it alive.
        os._exit(0)


def _make_trackers(request: Mapping[str, Any], channel: Channel) -> dict[str, Tracker] | None:
    directory, params = Path(request["directory"]), request["params"]
    info = RunInfo(request["run_name"], directory.name, directory, params)
    config_dir = Path(request["config_dir"]) if request["config_dir"] else None
    allow = request["allow"]
    admission = Admission(request["autoload"], None if allow is None else tuple(allow))
    trackers = {}
    try:
        registry = Registry(request["wrappers"], admission)
        for name, table in request["trackers"].items():
            options = registry.build_options("log", name, table, config_dir)
            trackers[name] = registry.log(name, info, options)
    except BaseException as err:
        if not isinstance(err, DovetailError):
            traceback.print_exc()
        channel.say("refused", kind=type(err).__name__, message=str(err))
        return None
    history = [
        [{"duration_s": call.duration_s, "result": call.result} for call in record.calls]
        for record in registry.history
    ]
    channel.say("ready", history=history)
    return trackers


def _follow(request: Mapping[str, Any], trackers: Mapping[str, Tracker], channel: Channel) -> None:
    directory, flush_s = Path(request["directory"]), request["flush_s"]
    lock = FolderLock(directory, FOLLOWERS)
    if not lock.try_acquire(flush_s):
        return  # somebody else feeds them
    followers = [
        Follower(
            name,
            tracker,
            directory / LOG_NAME,
            calls_per_s=request["calls_per_s"],
            on_parked=partial(_tell_parked, channel, name),
            on_refused=partial(_tell_refused, channel, name),
        )
        for name, tracker in trackers.items()
    ]
    for follower in followers:
        follower.start()
    status = channel.hear("end") or "failed"
    for follower in followers:
        follower.end(status)
    deadline_s = time.monotonic() + flush_s
    for follower in followers:
        if not follower.join(max(0.0, deadline_s - time.monotonic())):
            follower.give_up(late(flush_s))
    parked = {f.name: f.parked_by for f in followers if f.parked_by is not None}
    channel.say("done", parked=parked)


def _tell_warning(
    channel: Channel, message: Warning | str, category: type[Warning], *place: Any
) -> None:
    channel.say("warning", category=category.__name__, message=str(message))


def _tell_parked(channel: Channel, name: str, reason: str) -> None:
    channel.say("parked", name=name, reason=reason)


def _tell_refused(channel: Channel, name: str, file: str, reason: str) -> None:
    channel.say("refused file", name=name, file=file, reason=reason)
