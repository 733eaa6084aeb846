"""`dovetail log sync`: what trackers lack of a run that is over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dovetail.run.tracking.lock import RUN, FolderLock

Run = Callable[..., Result]

TRACKER = """
'''Notes what it is given in a file of the run's folder.'''
from pathlib import Path

from dovetail import PluginOptions, hookimpl


class Options(PluginOptions):
    fail_at: int = 0
    interrupt: bool = False


class Tracker:
    capabilities = frozenset()
    is_idempotent = True

    def __init__(self, run, options):
        if options.interrupt:
            raise KeyboardInterrupt
        self.path, self.options = run.directory / "noted.txt", options

    def log(self, metrics, step):
        if self.options.fail_at and step >= self.options.fail_at:
            raise OSError("the network\\n  is down")
        with self.path.open("a") as file:
            print(step, file=file)

    def log_params(self, params): ...
    def log_figure(self, name, path, step): ...
    def log_artifact(self, name, path): ...
    def close(self, status): ...


@hookimpl
def dovetail_log(run, options: Options):
    return Tracker(run, options)
"""

CONFIG = """
[run]
name = "tiny"
[model]
factory = "gone:build_model"
[log]
use = ["noting"]
"""


@pytest.fixture
def folder(tmp_path: Path, install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose model is no longer there, and whose trackers are installed."""
    install("dovetail-noting", {"log": ("noting",)}, TRACKER)
    install("dovetail-second", {"log": ("second",)}, TRACKER.replace("noted", "second"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "tiny" / "one"
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG)
    records: list[dict[str, Any]] = [{"kind": "params", "params": {}}]
    records += [{"kind": "step", "step": i, "metrics": {"loss": 1.0}} for i in (1, 2, 3)]
    records += [{"kind": "end", "status": "completed"}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("wanted", ["latest", "one", "tiny/one", "runs/tiny/one"])
def test_sync_says_what_each_tracker_was_given(folder: Path, run_cli: Run, wanted: str) -> None:
    head = f"sync {Path('runs/tiny/one')}"
    result = run_cli("log", "sync", wanted, "--to", "noting", "--to", "second")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        head,
        "noting: was given 4 records and has everything",
        "second: was given 4 records and has everything",
    ]
    for name in ("noted.txt", "second.txt"):
        assert (folder / name).read_text().split() == ["1", "2", "3"]
    result = run_cli("log", "sync", wanted)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [head, "noting: has everything already"]


def test_sync_fails_where_a_tracker_is_parked_and_goes_on_from_there(
    folder: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.run.tracking.follower.Follower.PAUSE_S", 1e-4)
    result = run_cli("log", "sync", "one", "log.noting.fail_at=3")
    assert result.exit_code == 1
    reason = "OSError: the network is down"
    line = f"noting: was given 3 records and is parked: {reason}"
    assert result.stdout.splitlines()[1:] == [line]
    result = run_cli("log", "sync", "one", "log.noting.fail_at=1")
    assert result.stdout.splitlines()[1] == f"noting: was given 1 record and is parked: {reason}"


def test_sync_loads_nothing_but_the_trackers(folder: Path) -> None:
    code = (
        "import sys\n"
        "from dovetail.cli._group import cli\n"
        "try:\n"
        "    cli(['log', 'sync', 'one'])\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'wandb', 'tensorboard', 'dovetail_plugins'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[1:] == ["noting: was given 4 records and has everything", "[]"]
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Missing argument 'RUN'"),
        (["two"], 1, "run 'two': is no run's folder, nor an id under 'runs'"),
        (["one", "--to", "notin"], 2, "option --to: no plugin is called 'notin'"),
        (["one", "log.noting.x=1"], 2, "config log.noting.x: unknown field"),
        (["one", "train.lr=1"], 2, "override train.lr: has no effect on trackers"),
        (["one", "--no-autoload"], 2, "option --no-autoload keeps it out"),
        (["one", "log.noting.interrupt=true"], 130, "interrupted"),
    ],
)
def test_sync_refuses_in_one_line(
    folder: Path, run_cli: Run, arguments: list[str], status: int, message: str
) -> None:
    result = run_cli("log", "sync", *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert not (folder / "noted.txt").exists()


def test_sync_leaves_a_run_alone_that_is_under_way(folder: Path, run_cli: Run) -> None:
    lock = FolderLock(folder, RUN)
    lock.acquire()
    result = run_cli("log", "sync", "one")
    lock.release()
    assert result.exit_code == 1
    assert "is in use by process" in result.stderr
    assert "Wait for it to end, or end it." in result.stderr
