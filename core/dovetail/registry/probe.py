"""Imports plugins where they can hurt nobody: each in a process of its own.

A child process imports torch and dovetail once and forks for each plugin, so that only what the
plugin itself costs is counted. Where forking is not to be had, each plugin gets a fresh process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Literal, NoReturn, TypeAlias

from dovetail.errors import DovetailDeprecationWarning, PluginError, build_message
from dovetail.registry.listing import PluginInfo

Outcome: TypeAlias = Literal["loads", "broken", "needs", "ended", "timed out"]

TIMEOUT_S = 60.0
"""Seconds a plugin gets for its import."""

PRELOADED: tuple[str, ...] = ("dovetail.pipeline", "dovetail.types")
"""Modules that a run imports anyway, torch with them; no plugin is charged for them."""

# A library of macOS may crash in a process that was forked after it was loaded.
CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"

# The path comes first: a file in the working directory must not stand in for a module of ours.
_BOOT = (
    "import os, sys; sys.path[:] = sys.argv.pop().split(os.pathsep); "
    "from dovetail.registry.probe import main; main()"
)
_READY = "ready\n"
_MAX_TEXT = 4000  # characters; an exception's text may be megabytes
_MAX_DEPRECATIONS = 20
_POLL_S = 0.01
_SPOILT = 113  # exit status of a fork in which nothing works any more


@dataclass(frozen=True)
class Probed:
    """What came of a plugin's import."""

    outcome: Outcome
    """It loads; is broken; needs a package; ended its process; or was not done in time."""
    reason: str | None = None
    """Why it does not load, plugin and remedy named."""
    package: str | None = None
    """What it needs and is not installed."""
    duration_ms: float = 0.0
    """Wall time of its import, milliseconds, without what torch and dovetail themselves cost."""
    deprecations: tuple[str, ...] = ()
    """What of the contract it uses that is on its way out."""


def probe_plugins(plugins: Sequence[PluginInfo], timeout_s: float = TIMEOUT_S) -> Iterator[Probed]:
    """Import and check plugins, none of them in this process.

    Args:
        plugins: Who is imported, one after the other.
        timeout_s: Seconds that each gets.

    Yields:
        What came of each, in their order.

    Raises:
        PluginError: No process could be started for it.
    """
    rest = list(plugins)
    while rest:
        # A plugin may end the process that forks, too: the others get another one.
        for probed in _ask(rest if CAN_FORK else rest[:1], timeout_s):
            rest = rest[1:]
            yield probed


def _ask(plugins: Sequence[PluginInfo], timeout_s: float) -> Iterator[Probed]:
    """Start the child process and read its answers, one at least."""
    with _started_child() as process:
        requests, answers = _pipes(process)
        rows = [asdict(info) for info in plugins]
        request = {
            "timeout_s": timeout_s,
            "fork": CAN_FORK,
            "preloaded": PRELOADED,
            "plugins": rows,
        }
        with suppress(BrokenPipeError):  # it did not start; that shows in its answer
            requests.write(json.dumps(request))
            requests.close()
        if answers.readline() != _READY:
            found = f"ended before it imported any plugin (exit status {process.wait()})"
            raise PluginError(build_message("the process that imports plugins", found))
        for info in plugins:
            watch = threading.Timer(timeout_s, process.kill)
            if not CAN_FORK:
                watch.start()
            start_s = time.perf_counter()
            line = answers.readline()
            watch.cancel()
            if line:
                yield _from_json(line)
                continue
            is_late = not CAN_FORK and time.perf_counter() - start_s >= timeout_s
            yield _timed_out(info, timeout_s) if is_late else _ended(info, process.wait())
            return


@contextmanager
def _started_child() -> Iterator[subprocess.Popen[str]]:
    # Libraries that start threads when they are imported are not for forking.
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    process = subprocess.Popen(
        [sys.executable, "-c", _BOOT, os.pathsep.join(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **single},
        encoding="utf-8",
    )
    try:
        yield process
    finally:
        # A process that forks ends its fork with it; any other may hold a thread that goes on.
        process.terminate() if CAN_FORK else process.kill()
        process.wait()
        for pipe in _pipes(process):
            with suppress(OSError):
                pipe.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _from_json(text: str) -> Probed:
    fields = json.loads(text)
    return Probed(**{**fields, "deprecations": tuple(fields["deprecations"])})


def _timed_out(info: PluginInfo, timeout_s: float) -> Probed:
    found = f"is not imported after {timeout_s:g} s"
    return Probed("timed out", _message(info, found), duration_ms=timeout_s * 1e3)


def _ended(info: PluginInfo, status: int) -> Probed:
    how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    return Probed("ended", _message(info, f"ended the process that imported it ({how})"))


def _message(info: PluginInfo, found: str) -> str:
    hint = f"Mend or remove it: pip uninstall {info.distribution}"
    return build_message(info.where, found, action=hint)


def main() -> None:
    """Answer the request on standard input: one line of JSON for each plugin."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    request = json.load(sys.stdin)
    # What a plugin prints must not get between the answers, nor onto the terminal.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    _preload(request["preloaded"])
    answers.write(_READY)
    answers.flush()
    for fields in request["plugins"]:
        info = PluginInfo(**fields)
        if request["fork"]:
            probed = _probe_in_fork(info, request["timeout_s"], answers.fileno())
        else:
            probed = _probe(info)
        answers.write(json.dumps(asdict(probed)) + "\n")
        answers.flush()


def _preload(modules: Sequence[str]) -> None:
    """Import what a run imports anyway."""
    from dovetail.registry.loading import new_manager

    for name in modules:
        # What is missing here is missing for the plugins too, and is told of each.
        with suppress(Exception):
            importlib.import_module(name)
    new_manager()


def _probe(info: PluginInfo) -> Probed:
    """Import and check a plugin in this process."""
    from dovetail.errors import MissingDependencyError
    from dovetail.registry.loading import import_plugin, load_backend

    clock, start_s = time.perf_counter, time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DovetailDeprecationWarning)
        try:
            plugin = import_plugin(info)
            duration_ms = (clock() - start_s) * 1e3
            load_backend(info, plugin)
        except MissingDependencyError as err:
            package = getattr(err.__cause__, "name", None) or "a package"
            return Probed("needs", _short(str(err)), package, (clock() - start_s) * 1e3)
        except BaseException as err:  # whatever it raises, on purpose too, is its own failure
            text = str(err) if info.where in str(err) else _message(info, f"raises {err!r}")
            return Probed("broken", _short(text), None, (clock() - start_s) * 1e3)
    told = [f"{w.message} ({w.filename}:{w.lineno})" for w in caught[:_MAX_DEPRECATIONS]]
    return Probed("loads", None, None, duration_ms, tuple(map(_short, told)))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _probe_in_fork(info: PluginInfo, timeout_s: float, answers: int) -> Probed:
    """Import and check a plugin in a fork of this process, which ends with it."""
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads; this process has none of its own.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _answer(info, sender, closed=(receiver, answers))
    os.close(sender)
    deadline_s = time.monotonic() + timeout_s
    try:
        line = _receive(receiver, deadline_s)
        is_alive = line is None or not (line or _has_ended(pid, deadline_s))
    finally:
        os.close(receiver)
        status = _end(pid)
    if is_alive:
        return _timed_out(info, timeout_s)
    if not line and status != _SPOILT:
        return _ended(info, status)
    with suppress(ValueError, TypeError, KeyError):
        return _from_json(line or "")
    return Probed("ended", _message(info, "spoilt the process that imported it: no answer came"))


def _answer(info: PluginInfo, sender: int, closed: tuple[int, ...]) -> NoReturn:
    """Do the work of a fork and end it."""
    # A plugin may put its own functions in the places of these.
    dumps, write, leave = json.dumps, os.write, os._exit
    try:
        os.setsid()  # whatever it starts can be ended with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in closed:
            os.close(descriptor)
        answer = (dumps(asdict(_probe(info))) + "\n").encode()
        while answer:
            answer = answer[write(sender, answer) :]
        leave(0)
    finally:
        leave(_SPOILT)


def _receive(receiver: int, deadline_s: float) -> str | None:
    """Return what a fork has written, up to the end of a line, or `None` when time is up."""
    import select

    received = b""
    while not received.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([receiver], [], [], left_s)[0]:
            return None
        chunk = os.read(receiver, 1 << 16)
        if not chunk:
            break
        received += chunk
    return received.decode(errors="replace")


def _has_ended(pid: int, deadline_s: float) -> bool:
    """Wait for a process that cannot answer any more; it may still run."""
    while time.monotonic() < deadline_s:
        # Its number stays taken, so that nobody else's group is ended later.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        time.sleep(_POLL_S)
    return False


def _end(pid: int) -> int:
    """End a fork with all that it started, and return its exit status, or minus its signal."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
