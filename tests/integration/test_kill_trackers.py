"""Runs that are killed at any moment: the log is whole, and a sync completes every tracker."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dovetail.run.tracking import LOG_NAME, MetricLog, read_records
from dovetail.run.tracking.lock import FOLLOWERS, is_locked

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX ones"),
    pytest.mark.usefixtures("wandb_home"),
]

NUM_KILLS = 7
"""Of one run, which is resumed after each."""
RUN_S = 0.6
"""How long a run goes on at most before it is killed, seconds."""
TRACKERS: dict[str, dict[str, Any]] = {"tensorboard": {}, "wandb": {"mode": "offline"}}

COMPLETE = [f"{name}: has everything already" for name in TRACKERS]
"""What a sync says of trackers that lack nothing."""

CONFIG = """
[run]
name = "killed"
[log]
use = ["tensorboard", "wandb"]
flush_s = 60
[log.wandb]
mode = "offline"
"""

TRAINER = """
import json, os, sys, time
from pathlib import Path

from dovetail.registry import default_registry
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
from dovetail.types import RunInfo

request = json.loads(sys.argv[1])
directory, first = Path(request["directory"]), request["first_step"]
params = {"train.lr": 0.1}
registry = default_registry()
chosen = {
    name: TrackerChoice(registry.build_options("log", name, table), table)
    for name, table in request["trackers"].items()
}
resumed_at = (first - 1, request["log_bytes"]) if first > 1 else None
log = open_log(directory, resumed_at, patience_s=60)
info = RunInfo("killed", directory.name, directory, params)
trackers, sidecar = make_trackers(registry, info, chosen, flush_s=60)
assert not trackers and "torch" not in sys.modules
with Tracking(log, trackers, params, sidecar, flush_s=60):
    for step in range(first, 100_000):
        # The same at the second time: a run is resumed to the bit.
        metrics = {"train/loss": 1 / step, "train/lr": 0.5}
        log.write({"kind": "step", "step": step, "epoch": 0, "time": 0.0, "metrics": metrics})
        os.write(1, b"%d %d\\n" % (step, log.tell()))
        time.sleep(0.001)
"""

INSPECT = """
import sys
from wandb.cli.cli import cli

for path in sys.argv[1:]:
    try:
        cli(["leet", "inspect", "--json", path])
    except SystemExit as end:
        if end.code:
            raise
"""
"""`wandb leet inspect` of several files: most of its time is the start of the interpreter."""

Series: TypeAlias = "list[tuple[int, float]]"


class KilledRun:
    """A run that is started, killed and resumed, and what it said it had written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._said = directory.with_suffix(".said")
        self._num_steps = 0
        self.sync_command = [sys.executable, "-m", "dovetail", "log", "sync", str(directory)]
        self.announced: list[tuple[int, int]] = []
        """Steps that the last process had written, each with the length of the log then."""
        directory.mkdir()
        (directory / "config.toml").write_text(CONFIG)

    @contextmanager
    def start(self, checkpoint: tuple[int, int] = (0, 0)) -> Iterator[subprocess.Popen[str]]:
        """Train from a checkpoint on, in a process group of its own."""
        step, log_bytes = checkpoint
        request = {
            "directory": str(self.directory),
            "trackers": TRACKERS,
            "first_step": step + 1,
            "log_bytes": log_bytes,
        }
        with self._said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", TRAINER, json.dumps(request)],
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        rows = [line.split() for line in self._said.read_text().splitlines()]
        self.announced = [(int(step), int(size)) for step, size in rows]

    def wait_for_a_step(self, process: subprocess.Popen[str]) -> None:
        """Wait until the process has announced something."""
        while not self._said.stat().st_size:
            assert not has_ended(process, 0.01), process.communicate()[1]

    def sync(self) -> str:
        """Run `dovetail log sync`; return what it says."""
        ended = run_command(*self.sync_command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def check_log(self, checkpoint: tuple[int, int]) -> Series:
        """Return the steps of the log, each with its loss; all that was announced is there."""
        path = self.directory / LOG_NAME
        if not path.exists():  # it did not even come to that
            assert not self.announced
            return []
        data = path.read_bytes()
        assert not data or data.endswith(b"\n")
        records = [json.loads(line) for line in data.splitlines()]
        assert records == list(read_records(self.directory))
        steps = [(r["step"], r["metrics"]["train/loss"]) for r in records if r["kind"] == "step"]
        assert steps == [(step, 1 / step) for step in range(1, len(steps) + 1)]
        if self.announced:
            assert len(steps) - self.announced[-1][0] in (0, 1)
        else:  # it did not come that far: the log is as it was, or cut at the checkpoint
            assert len(steps) in (self._num_steps, checkpoint[0], checkpoint[0] + 1)
        self._num_steps = len(steps)
        return steps


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def has_ended(process: subprocess.Popen[Any], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def read_tensorboard(directory: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0}
    found = EventAccumulator(str(directory / "tensorboard"), size_guidance=sizes).Reload()
    return [(event.step, event.value) for event in found.Scalars("train/loss")]


def find_wandb_files(directory: Path) -> list[Path]:
    return sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))


def read_wandb(directory: Path) -> Series:
    """Read W&B's files by its own command."""
    ended = run_command(sys.executable, "-c", INSPECT, *map(str, find_wandb_files(directory)))
    if "No such command" in ended.stderr:
        pytest.skip("this release of wandb cannot inspect files")
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(item["optimizer_step"], item["train/loss"]) for item in items]


def check_trackers(directory: Path, expected: Series) -> None:
    """Check that each tracker holds every step of the log, once and with its value."""
    steps = dict.fromkeys((step for step, _ in expected), 1)
    found = read_tensorboard(directory)
    assert Counter(step for step, _ in found) == steps
    assert dict(found) == pytest.approx(dict(expected), rel=1e-6)  # float32
    found = read_wandb(directory)
    # It takes no row back: a run that is resumed has rows from before until it is there again.
    counts = Counter(step for step, _ in found)
    assert set(counts.values()) <= {1}
    assert [(step, value) for step, value in sorted(found) if step in steps] == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_run_loses_nothing_when_its_process_group_is_killed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = KilledRun(tmp_path / "run")
    checkpoint = (0, 0)
    for kill in range(NUM_KILLS):
        # Drawn at once: what is drawn must not depend on how far a process came.
        is_early, moment_s, place = rng.random() < 0.5, rng.uniform(0, RUN_S), rng.random()
        with run.start(checkpoint) as process:
            if not (is_early and kill % 2 == 0):  # else it may not come to a step
                run.wait_for_a_step(process)
            assert not has_ended(process, moment_s)
        steps = run.check_log(checkpoint)
        print(f"seed {seed} kill {kill}: {len(steps)} steps from {checkpoint[0]}, {moment_s:.3f} s")
        if kill in (3, NUM_KILLS - 1):
            run.sync()
            check_trackers(run.directory, steps)
        # Back to a checkpoint before the end, or on from the last step.
        choices = run.announced[-50:] or [checkpoint]
        checkpoint = choices[int(place * len(choices))]
    assert run.sync().splitlines()[1:] == COMPLETE


def test_trackers_are_completed_when_the_training_alone_is_killed(tmp_path: Path) -> None:
    run = KilledRun(tmp_path / "run")
    with run.start() as process:
        run.wait_for_a_step(process)
        assert not has_ended(process, 0.3)
        process.kill()
        # Its end is seen when nobody is left that the run has started: they all have this pipe.
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    steps = run.check_log((0, 0))
    assert not is_locked(run.directory, FOLLOWERS)
    check_trackers(run.directory, steps)
    assert run.sync().splitlines()[1:] == COMPLETE


def test_sync_that_is_killed_itself_is_completed_by_the_next(tmp_path: Path) -> None:
    rng = random.Random(0)
    run = KilledRun(tmp_path / "run")
    steps = [(step, 1 / step) for step in range(1, 3001)]
    log = MetricLog(run.directory)
    for step, loss in steps:
        log.write({"kind": "step", "step": step, "metrics": {"train/loss": loss}})
    log.close()
    for num_before in range(2):
        # So slow that it is not done when it is killed.
        with subprocess.Popen([*run.sync_command, "log.calls_per_s=2000"]) as process:
            while len(find_wandb_files(run.directory)) == num_before:
                assert not has_ended(process, 0.01)
            assert not has_ended(process, rng.uniform(0.2, 1.2))
            process.kill()
    run.sync()
    check_trackers(run.directory, steps)
    assert run.sync().splitlines()[1:] == COMPLETE
