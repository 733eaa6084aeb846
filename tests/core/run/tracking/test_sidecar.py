from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from dovetail.errors import (
    ConfigError,
    DovetailError,
    PluginError,
    RunError,
    UnknownPluginError,
)
from dovetail.registry import Registry
from dovetail.run.tracking import read_records, sidecar
from dovetail.run.tracking.cursor import Cursor, Position
from dovetail.run.tracking.lock import FOLLOWERS, is_locked
from dovetail.run.tracking.log import MetricLog
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.sidecar import Sidecar, SidecarRequest
from dovetail.types import RunInfo

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# Not part of the tests' own process: what another one can import lies in files.
PLUGIN = '''
"""Notes calls in a file of the run's folder, and does what its options say before."""

import json, os, signal, sys, threading, time
from pathlib import Path

from dovetail import PluginOptions, hookimpl
from dovetail.errors import RunError

dovetail_api = 1


class Options(PluginOptions):
    when_made: str = "pass"
    """What is done when it is made."""
    when_logging: str = "pass"
    """What is done before a row is noted."""
    when_given_files: str = "pass"
    """What is done before a file is noted."""
    when_closed: str = "pass"
    """What is done before the end is noted."""


class Noting:
    capabilities = frozenset({"artifacts"})

    def __init__(self, run, options):
        self.run, self.options, self.num_rows = run, options, 0
        self.folder = Path(run.directory)
        exec(options.when_made)
        self.note(made=os.getpid())

    def note(self, **fields):
        with (self.folder / "noting.jsonl").open("a") as file:
            file.write(json.dumps(fields) + "\\n")

    def log(self, metrics, step):
        self.num_rows += 1
        exec(self.options.when_logging)
        self.note(step=step, metrics=metrics)

    def log_params(self, params):
        self.note(params=params)

    def log_figure(self, name, path, step): ...

    def log_artifact(self, name, path):
        exec(self.options.when_given_files)
        self.note(file=str(path))

    def close(self, status):
        exec(self.options.when_closed)
        self.note(status=status)


@hookimpl
def dovetail_log(run, options: Options):
    return Noting(run, options)
'''

WAIT_FOR_GATE = "while not (self.folder / 'gate').exists(): time.sleep(0.005)"
"""Code of a tracker that goes on when a test lets it."""

FORK = "pid = os.fork() or (time.sleep(60), os._exit(0))"
"""Code of a tracker that starts a copy of its process, which outlives it."""


def step_record(step: int) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": {"train/loss": float(step)}}


@pytest.fixture(autouse=True)
def planted(site: Any) -> None:
    names = {"noting": "planted_noting", "other": "planted_noting"}
    site.add("planted", {"dovetail.log": names}, planted_noting=PLUGIN)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., Sidecar]]:
    """Starter of the process with one tracker, whose options are given, or with several."""
    made: list[Sidecar] = []

    def make(
        name: str = "noting", *, trackers: Any = None, flush_s: float = 30.0, **options: Any
    ) -> Sidecar:
        chosen = trackers or {name: options}
        request = SidecarRequest(str(run_dir), "mine", {"a.b": 1}, chosen, flush_s=flush_s)
        made.append(Sidecar(request))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def notes_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "noting.jsonl").read_text().splitlines()]


def steps_of(run_dir: Path) -> list[int]:
    return [note["step"] for note in notes_of(run_dir) if "step" in note]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, waited for by its parent or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def follow(
    run_dir: Path, process: Sidecar, records: Any, flush_s: float = 30.0
) -> tuple[Mapping[str, str], list[str]]:
    """Write a run's records; return who is parked and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracking(open_log(run_dir), {}, {"a.b": 1}, process, flush_s=flush_s) as tracking:
            for record in records:
                tracking.log.write(record)
            tracking.status = "completed"
    return tracking.parked, [str(warning.message) for warning in caught]


def check_whole(run_dir: Path, num_steps: int) -> None:
    made, params, *rows, end = notes_of(run_dir)
    assert params == {"params": {"a.b": 1}}
    assert rows == [{"step": s, "metrics": {"train/loss": float(s)}} for s in range(num_steps)]
    assert end == {"status": "completed"}
    assert is_gone(made["made"])


# --- a whole run


def test_trackers_of_another_process_get_everything_once(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    # What a library leaves running does not keep the process from its end.
    process = start(when_made="threading.Thread(target=threading.Event().wait).start()")
    (calls,) = process.history
    assert [(call["result"], call["duration_s"] > 0) for call in calls] == [("Noting", True)]
    assert follow(run_dir, process, map(step_record, range(50))) == ({}, [])
    check_whole(run_dir, 50)
    assert notes_of(run_dir)[0]["made"] != os.getpid()
    assert process._process.returncode == 0
    size_bytes = (run_dir / "metrics.jsonl").stat().st_size
    assert Cursor(run_dir, "noting").read() == Position(size_bytes, is_clean=True)


def test_process_of_trackers_holds_their_lock_and_imports_no_torch(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    process = start(when_logging=f"{WAIT_FOR_GATE}\nself.note(modules=sorted(sys.modules))")
    with Tracking(open_log(run_dir), {}, {}, process) as tracking:
        tracking.log.write(step_record(0))
        while len(notes_of(run_dir)) < 2:  # it was given the settings
            time.sleep(0.005)
        assert is_locked(run_dir, FOLLOWERS)
        (run_dir / "gate").touch()
    assert not is_locked(run_dir, FOLLOWERS)
    (modules,) = [note["modules"] for note in notes_of(run_dir) if "modules" in note]
    assert "dovetail.run.tracking.follower" in modules
    assert not {"torch", "numpy", "dovetail.run.fit"} & set(modules)


def test_trackers_are_left_to_whoever_feeds_them_already(
    run_dir: Path, start: Callable[..., Sidecar], other_process: Any
) -> None:
    with other_process(run_dir, FOLLOWERS) as other:
        process = start(flush_s=0.0)
        with (
            pytest.warns(UserWarning, match="is parked: their process ended with status 0"),
            Tracking(MetricLog(run_dir), {}, {}, process) as tracking,
        ):
            tracking.log.write(step_record(0))
        assert other.poll() is None
    assert list(tracking.parked) == ["noting"]
    assert [list(note) for note in notes_of(run_dir)] == [["made"]]


def test_what_is_logged_is_logged_in_the_training(
    run_dir: Path, start: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "planted.some")
    made = "import logging; logging.getLogger('planted.some').info('made %d', 1)"
    logged = (
        "import logging; logging.getLogger('planted.other').info('too low')\n"
        "try:\n    1 / 0\n"
        "except ZeroDivisionError:\n    logging.getLogger('planted.other').exception('at a row')"
    )
    assert follow(run_dir, start(when_made=made, when_logging=logged), [step_record(0)]) == ({}, [])
    (first, second) = caplog.record_tuples
    assert first == ("planted.some", logging.INFO, "made 1")
    assert second[:2] == ("planted.other", logging.ERROR)
    assert second[2].startswith("at a row\nTraceback ")
    assert second[2].endswith("ZeroDivisionError: division by zero")


def test_what_is_warned_of_is_warned_of_in_the_training(start: Callable[..., Sidecar]) -> None:
    with pytest.warns(RuntimeWarning, match="^odd$"):
        start(when_made="import warnings; warnings.warn('odd', RuntimeWarning)")
    with pytest.warns(UserWarning, match="^of one's own$"):
        start(
            when_made="import warnings; Own = type('Own', (UserWarning,), {}); "
            'warnings.warn("of one\'s own", Own)'
        )


def test_what_is_printed_disturbs_nobody(
    run_dir: Path,
    start: Callable[..., Sidecar],
    site: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # What an interpreter runs before anything else may print as well.
    site.add_module("sitecustomize", "print('[good morning]')\nprint('{}')")
    monkeypatch.setenv("PYTHONPATH", str(site.path), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    shout = 'print(\'{"event": "done", "parked": {}}\'); os.write(1, b\'[written]\' * 20_000)'
    process = start(when_made=shout, when_logging=shout, when_closed=shout)
    assert follow(run_dir, process, map(step_record, range(3))) == ({}, [])
    check_whole(run_dir, 3)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count('{"event": "done"') == 5
    assert captured.err.count("[written]") == 100_000


def test_a_module_of_the_current_folder_stands_in_for_none_of_python(
    run_dir: Path, start: Callable[..., Sidecar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not the one of Python')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert follow(run_dir, start(), [step_record(0)]) == ({}, [])
    check_whole(run_dir, 1)


@needs_posix
def test_signals_of_the_terminal_are_for_the_training_alone(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    process = start()
    with Tracking(open_log(run_dir), {}, {"a.b": 1}, process) as tracking:
        tracking.log.write(step_record(0))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(notes_of(run_dir)[0]["made"], number)
        tracking.log.write(step_record(1))
        tracking.status = "completed"
    assert tracking.parked == {}
    check_whole(run_dir, 2)


# --- trackers that cannot be made


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("notting", {}, UnknownPluginError),
        ("noting", {"colour": "red"}, ConfigError),
        ("noting", {"when_made": "raise RunError('no room.')"}, RunError),
        ("noting", {"when_made": "sys.exit(3)"}, PluginError),
    ],
)
def test_an_error_in_making_a_tracker_comes_back_as_it_is(
    run_dir: Path,
    start: Callable[..., Sidecar],
    name: str,
    options: dict[str, Any],
    kind: type[DovetailError],
) -> None:
    def make_here() -> None:
        registry = Registry()
        made = registry.build_options("log", name, options)
        registry.log(name, RunInfo("mine", "run", run_dir, {}), made)

    with pytest.raises(DovetailError) as here:
        make_here()
    with pytest.raises(DovetailError) as there:
        start(name, **options)
    assert type(there.value) is type(here.value) is kind
    assert str(there.value) == str(here.value)
    assert list(run_dir.iterdir()) == []


def test_a_process_that_ends_before_its_trackers_are_made_is_told_of(
    start: Callable[..., Sidecar],
) -> None:
    with pytest.raises(RunError) as caught:
        start(when_made="os._exit(9)")
    assert str(caught.value) == (
        "process of the trackers: their process ended with status 9; expected trackers that start."
    )


@needs_posix
def test_trackers_whose_making_hangs_are_waited_for_a_bounded_time(
    start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "START_S", 0.01)
    with pytest.raises(RunError, match="their process ended with status -9; expected trackers"):
        start(when_made="threading.Event().wait()")


def test_an_interpreter_that_cannot_be_started_is_told_of(
    start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nosuch"))
    with pytest.raises(RunError) as caught:
        start()
    assert str(caught.value).startswith("process of the trackers: cannot be started: No such file")
    assert str(caught.value).endswith('Set log.follow = "thread".')


# --- trackers that fail


def test_what_happens_to_trackers_is_warned_of_in_the_training(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    process = start(
        when_made="from dovetail.run.tracking.follower import Follower; Follower.PAUSE_S = 1e-4",
        when_given_files="raise ValueError('too large')",
        when_logging="if self.num_rows > 1: raise OSError('network')",
    )
    file = {"kind": "artifact", "name": "bundle", "file": "bundle"}
    parked, texts = follow(run_dir, process, [file, *map(step_record, range(3))])
    assert parked == {"noting": "OSError: network"}
    refused, told = texts
    assert refused == "tracker 'noting': does not take bundle: ValueError: too large."
    assert told.startswith("tracker 'noting': is parked: OSError: network. The run goes on; ")
    assert told.endswith(f"dovetail log sync {run_dir}")
    assert steps_of(run_dir) == [0]
    assert [r["step"] for r in read_records(run_dir) if "metrics" in r] == [0, 1, 2]


def test_a_tracker_that_hangs_costs_the_others_of_its_process_nothing(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    hangs = {"when_logging": "self.note(hangs=True); threading.Event().wait()"}
    process = start(trackers={"noting": hangs, "other": {}}, flush_s=1.0)
    parked, (text,) = follow(run_dir, process, map(step_record, range(2)), flush_s=1.0)
    assert parked == {"noting": "did not finish within 1 s (log.flush_s)"}
    assert text.startswith("tracker 'noting': is parked: did not finish within 1 s")
    notes = notes_of(run_dir)
    assert {"hangs": True} in notes
    assert steps_of(run_dir) == [0, 1]
    assert [note for note in notes if "status" in note] == [{"status": "completed"}]
    assert is_gone(notes[0]["made"])


def test_trackers_whose_process_dies_are_parked(
    run_dir: Path, start: Callable[..., Sidecar]
) -> None:
    process = start(when_logging="if self.num_rows > 2: os._exit(9)")
    parked, (text,) = follow(run_dir, process, map(step_record, range(5)))
    assert parked == {"noting": "their process ended with status 9"}
    assert text.startswith("tracker 'noting': is parked: their process ended with status 9. ")
    assert steps_of(run_dir) == [0, 1]


@needs_posix
def test_a_process_that_stands_still_is_given_up_and_ended(
    run_dir: Path, start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "END_S", 0.05)
    process = start(flush_s=0.05)
    pid = notes_of(run_dir)[0]["made"]
    os.kill(pid, signal.SIGSTOP)
    parked, (text,) = follow(run_dir, process, [step_record(0)], flush_s=0.05)
    assert parked == {"noting": "did not finish within 0.05 s (log.flush_s)"}
    assert "is parked: did not finish" in text
    assert is_gone(pid)


@needs_posix
def test_a_process_that_has_hung_up_is_ended(
    run_dir: Path, start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "END_S", 0.05)
    # As a library does that makes itself a daemon.
    process = start(when_logging="os.closerange(3, 100); threading.Event().wait()")
    parked, _ = follow(run_dir, process, [step_record(0)])
    assert parked == {"noting": "their process does not answer any more"}
    assert is_gone(notes_of(run_dir)[0]["made"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_a_tracker_has_forked_is_not_waited_for(
    run_dir: Path, start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It holds the pipe to the training for as long as it lives.
    monkeypatch.setattr(sidecar, "END_S", 0.05)
    process = start(when_closed=f"{FORK}; self.note(forked=pid)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert follow(run_dir, process, [step_record(0)]) == ({}, [])
        assert notes_of(run_dir)[-1] == {"status": "completed"}
        assert not process._listener.is_alive()
    finally:
        (forked,) = [note["forked"] for note in notes_of(run_dir) if "forked" in note]
        assert not is_gone(forked)
        os.kill(forked, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_pipe_that_a_forked_process_holds_is_left_open_where_a_tracker_hangs(
    run_dir: Path, start: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "END_S", 0.05)
    forks = f"{FORK}; self.note(forked=pid); os.kill(os.getpid(), signal.SIGSTOP)"
    process = start(flush_s=0.05, when_logging=forks)
    pid = notes_of(run_dir)[0]["made"]
    with contextlib.closing(open_log(run_dir)) as log:
        log.write(step_record(0))
        process.start()
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.005)
        process.end("completed")
        with pytest.warns(UserWarning, match="is parked: did not finish"):
            process.join(0.05)
    assert is_gone(pid)
    (forked,) = [note["forked"] for note in notes_of(run_dir) if "forked" in note]
    os.kill(forked, signal.SIGKILL)
    process._listener.join(10)


# --- a training that dies


TRAINING = """
import json, os, sys, time, warnings
request = json.loads(sys.argv[1])
sys.path[:] = request.pop("path")
from pathlib import Path
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.sidecar import Sidecar, SidecarRequest

directory = Path(request["directory"])
log = open_log(directory)
with Tracking(log, {}, {"a.b": 1}, Sidecar(SidecarRequest(**request))) as tracking:
    for step in range(20):
        log.write({"kind": "step", "step": step, "metrics": {"train/loss": float(step)}})
    WORKER
    print("written", flush=True)
    sys.stdin.read()
"""

WORKER = """
    # As a data worker: it holds the training's end of the pipe to the trackers.
    warnings.simplefilter("ignore")
    pid = os.fork()
    if not pid:
        os.closerange(0, 3)
        time.sleep(60)
        os._exit(0)
    (directory / "worker").write_text(str(pid))
"""


@contextlib.contextmanager
def training(
    run_dir: Path, *, has_worker: bool = False, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A training of 20 steps, which then goes on until it is killed."""
    request = {
        "path": [os.path.abspath(entry) for entry in sys.path if entry],
        "directory": str(run_dir),
        "run_name": "mine",
        "params": {},
        "trackers": {"noting": options},
    }
    pipe = subprocess.PIPE
    code = TRAINING.replace("WORKER", WORKER.strip() if has_worker else "")
    command = [sys.executable, "-c", code, json.dumps(request)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            if (run_dir / "worker").exists():
                os.kill(int((run_dir / "worker").read_text()), signal.SIGKILL)


def await_end(process: subprocess.Popen[str], pid: int) -> None:
    """Wait until a process that shares the standard error of another one is gone."""
    _, errors = process.communicate(timeout=30)
    assert errors == ""
    deadline_s = time.monotonic() + 10
    while not is_gone(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@needs_posix
@pytest.mark.parametrize("has_worker", [False, True])
def test_trackers_of_a_training_that_is_killed_get_everything_and_end(
    run_dir: Path, has_worker: bool
) -> None:
    with training(run_dir, has_worker=has_worker, when_logging=WAIT_FOR_GATE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        pid = notes_of(run_dir)[0]["made"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert steps_of(run_dir) == []
        assert not is_gone(pid)
        (run_dir / "gate").touch()
        await_end(process, pid)
    assert steps_of(run_dir) == list(range(20))
    assert notes_of(run_dir)[-1] == {"status": "failed"}
    size_bytes = (run_dir / "metrics.jsonl").stat().st_size
    assert Cursor(run_dir, "noting").read() == Position(size_bytes, is_clean=True)
    assert not is_locked(run_dir, FOLLOWERS)


@needs_posix
def test_trackers_of_a_training_that_is_killed_while_they_are_made_end(run_dir: Path) -> None:
    hangs = "self.note(made=os.getpid()); threading.Event().wait()"
    with training(run_dir, when_made=hangs) as process:
        while not (run_dir / "noting.jsonl").exists() or not notes_of(run_dir):
            assert process.poll() is None
            time.sleep(0.005)
        pid = notes_of(run_dir)[0]["made"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        await_end(process, pid)
    assert len(notes_of(run_dir)) == 1
