"""A run that is killed at any moment: after a sync its MLflow run has every step once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX ones")

NUM_KILLS = 4
RUN_S = 1.0
"""How long the run goes on at most before it is killed, seconds."""

CONFIG = """
[run]
name = "killed"
[log]
use = ["mlflow"]
flush_s = 60
"""

TRAINER = """
import json, os, sys, time
from pathlib import Path

from dovetail import RunInfo
from dovetail.registry import default_registry
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers

directory, first, log_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
params = {"train.lr": 0.1}
registry = default_registry()
chosen = {"mlflow": TrackerChoice(registry.build_options("log", "mlflow", {}), {})}
log = open_log(directory, (first - 1, log_bytes) if first > 1 else None, patience_s=60)
info = RunInfo("killed", directory.name, directory, params)
trackers, sidecar = make_trackers(registry, info, chosen, flush_s=60)
with Tracking(log, trackers, params, sidecar, flush_s=60):
    for step in range(first, 100_000):
        # The same at the second time: a run is resumed to the bit.
        record = {"kind": "step", "step": step, "metrics": {"train/loss": 1 / step}}
        log.write(record)
        os.write(1, b"%d %d\\n" % (step, log.tell()))
        time.sleep(0.002)
"""


def train_and_kill(directory: Path, checkpoint: tuple[int, int], seconds: float) -> list[list[int]]:
    """Train in a process group of its own, and kill it; return the steps that it announced."""
    said = directory.with_suffix(".said")
    command = [sys.executable, "-c", TRAINER, str(directory), str(checkpoint[0] + 1)]
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(checkpoint[1])], stdout=output, start_new_session=True
        )
    try:
        while not said.stat().st_size:
            assert not has_ended(process, 0.01)
        assert not has_ended(process, seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [[int(word) for word in line.split()] for line in said.read_text().splitlines()]


def has_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def sync(directory: Path) -> list[str]:
    """Run `dovetail log sync`; return what it says of the trackers."""
    command = [sys.executable, "-m", "dovetail", "log", "sync", str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()[1:]


def test_mlflow_has_every_step_once_after_kills_and_a_sync(tmp_path, read):
    rng = random.Random(0)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.toml").write_text(CONFIG)
    checkpoint = (0, 0)
    for kill in range(NUM_KILLS):
        seconds, place = rng.uniform(0, RUN_S), rng.random()
        announced = train_and_kill(directory, checkpoint, seconds)
        records = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if record["kind"] == "step"]
        print(f"kill {kill}: {len(steps)} steps from {checkpoint[0]}, {seconds:.3f} s")
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) - announced[-1][0] in (0, 1)
        if kill in (1, NUM_KILLS - 1):
            sync(directory)
            history = read(directory).history["train/loss"]
            assert Counter(step for step, _ in history) == Counter(steps)
            assert dict(history) == {step: 1 / step for step in steps}
        choices = announced[-50:]
        checkpoint = tuple(choices[int(place * len(choices))])
    assert sync(directory) == ["mlflow: has everything already"]
