"""The whole job on two processes that a real torchrun has started, on loopback and the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dovetail
from dovetail.run.tracking import read_records

pytestmark = pytest.mark.slow

JOB = '''
import os
import signal

import torch
from torch import nn


class Net(nn.Module):
    """Does to its process what a test has planted, in the first life of a launch."""

    def __init__(self, dropout=0.0, norm=False, double=False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16)])
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 2)
        self.num_passes = 0
        if double:
            self.double()

    def forward(self, features):
        if self.training and torch.is_grad_enabled():
            self.num_passes += 1
            self.act(*os.environ.get("PLANTED", "nothing,,0").split(","))
        x = features.to(self.head.weight.dtype)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(self.drop(self.norm(x)))

    def act(self, action, rank, number):
        is_first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if is_first_life and os.environ.get("RANK") == rank and self.num_passes == int(number):
            if action == "raise":
                raise ValueError("planted")
            os.kill(os.getpid(), getattr(signal, action))


class Noisy(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        features, label = self.samples[index]
        return features + 0.1 * torch.randn(6), label


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def build(**arguments):
    return Net(**arguments)


def load(kind="plain", num=91):
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(num + 37, 6, generator=generator)
    labels = (features[:, 0] + features[:, 1] > 0).long().tolist()
    samples = list(zip(features, labels))
    train, validation = samples[:num], samples[num:]
    if kind == "noisy":
        return {"train": Noisy(train), "validation": validation}
    if kind == "stream":
        return {"train": Stream(train), "validation": Stream(validation)}
    return {"train": train, "validation": validation}
'''

CONFIG = """
[run]
name = "small"
seed = 3
report = false
[model]
factory = "torchrun_job:build"
[data]
factory = "torchrun_job:load"
[task]
modality = "tabular"
kind = "classification"
num_classes = 2
[train]
epochs = 3
batch_size = 8
lr = 0.02
device = "cpu"
[collate]
use = "tabular"
[accumulate.exact]
steps = 2
[log]
system_s = 0
"""

LAUNCHER = """
import os
import sys

# Each rank has what is installed on its own machine.
sys.path.insert(0, os.path.join(os.environ["SITES"], os.environ["RANK"]))
from dovetail.cli import main

main()
"""

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DOUBLE = ("model.kwargs.double=true",)
RANDOM = (
    "model.kwargs.dropout=0.2",
    "model.kwargs.norm=true",
    "data.kwargs.kind=noisy",
    "train.checkpoint_steps=1",
)

Torchrun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its model and its data, in which the runs are."""
    path = tmp_path_factory.mktemp("torchrun")
    (path / "torchrun_job.py").write_text(JOB)
    (path / "config.toml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def torchrun(home: Path) -> Torchrun:
    """Starts `dovetail train` on two processes; all that they print is in `stdout`."""

    def start(
        *settings: str,
        launch: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "dovetail"),
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *LAUNCH, *launch, *program, "train", "config.toml", *settings]
        return subprocess.run(
            command,
            cwd=home,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )

    return start


@pytest.fixture(scope="module")
def alone(home: Path) -> Callable[..., dovetail.TrainingResult]:
    """Trains in this process."""

    def train(*settings: str, **arguments: Any) -> dovetail.TrainingResult:
        here = f'run.dir="{(home / "runs").as_posix()}"'
        return dovetail.train(home / "config.toml", [here, *settings], **arguments)

    return train


@pytest.fixture(scope="module")
def whole(torchrun: Torchrun, home: Path) -> Path:
    """A run with dropout, BatchNorm and augmentation that nothing has disturbed."""
    done = torchrun("run.id=whole", *RANDOM)
    assert done.returncode == 0, done.stdout
    return home / "runs" / "small" / "whole"


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    steps = sorted((run_dir / "checkpoints").glob("step-*"))
    return load_file(steps[-1] / "model.safetensors")


def records_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir) if record["kind"] == kind]


def assert_same_run(first: Path, second: Path) -> None:
    """Hold steps, evaluations and weights of two runs against each other, to the bit."""
    for kind in ("step", "evaluation"):
        theirs, ours = (
            [(r["step"], r["metrics"]) for r in records_of(run_dir, kind)]
            for run_dir in (first, second)
        )
        assert ours == theirs
    one, other = weights_of(first), weights_of(second)
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_close_runs(first: Path, second: Path, tolerance: float) -> None:
    """Hold weights and evaluations of two runs against each other."""
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        error = (weight.double() - other[name].double()).abs().max() / weight.abs().max()
        assert error <= tolerance, name
    evaluations = zip(
        records_of(first, "evaluation"), records_of(second, "evaluation"), strict=True
    )
    for ours, theirs in evaluations:
        for name, value in ours["metrics"].items():
            assert theirs["metrics"][name] == pytest.approx(value, rel=tolerance)


def test_two_processes_equal_one_that_accumulates_twice_as_long(
    torchrun: Torchrun, alone: Callable[..., dovetail.TrainingResult], home: Path
) -> None:
    # 91 samples are 12 batches, 37 are 5: one rank has a last batch that the other has not.
    done = torchrun("run.id=pair", *DOUBLE)
    assert done.returncode == 0, done.stdout
    single = alone("run.id=single", "accumulate.exact.steps=4", *DOUBLE)
    pair = home / "runs" / "small" / "pair"
    assert_close_runs(single.run_dir, pair, 1e-12)
    steps = records_of(pair, "step")
    assert [step["items"] for step in steps] == [32, 32, 27] * 3
    # Rank 0 alone has written, and spoken.
    assert sorted(path.name for path in pair.parent.glob("*")) == ["pair", "single"]
    assert [r["kind"] for r in read_records(pair)].count("params") == 1
    for line in ("418 parameters on 2 x cpu; 9 steps in 3 epochs", "completed: 9 steps"):
        assert done.stdout.count(line) == 1
    assert "warning" not in done.stdout


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="gloo of torch 2.7 and 2.8 adds the gradients of fully_shard, which is refused",
)
def test_fsdp_equals_one_process_and_its_checkpoint_goes_on_in_one(
    torchrun: Torchrun, alone: Callable[..., dovetail.TrainingResult], home: Path
) -> None:
    # A constant rate: the steps of the rest are no longer those of the beginning.
    shared = (*DOUBLE, "train.schedule=constant", "train.epochs=2")
    done = torchrun("run.id=sharded", "distributed.strategy=fsdp", *shared)
    assert done.returncode == 0, done.stdout
    sharded = home / "runs" / "small" / "sharded"
    whole = alone("run.id=unsharded", "accumulate.exact.steps=4", *shared)
    assert_close_runs(whole.run_dir, sharded, 1e-12)
    with pytest.warns(UserWarning, match="2 processes trained, 1 go on"):
        longer = alone(*shared, "train.epochs=3", resume=sharded)
    assert longer.status == "completed"
    assert longer.num_steps == 6 + 6
    assert longer.final_metrics["val/loss"] < whole.final_metrics["val/loss"]


def test_streams_are_divided_by_turns_and_end_together(
    torchrun: Torchrun, alone: Callable[..., dovetail.TrainingResult], home: Path
) -> None:
    shared = ("data.kwargs.kind=stream", "train.schedule=constant", *DOUBLE)
    done = torchrun("run.id=turns", "distributed.data=split", *shared)
    assert done.returncode == 0, done.stdout
    single = alone("run.id=one-stream", "accumulate.exact.steps=4", *shared)
    assert_close_runs(single.run_dir, home / "runs" / "small" / "turns", 1e-12)


def test_a_killed_rank_ends_all_and_is_named(torchrun: Torchrun, home: Path) -> None:
    killed = torchrun("run.id=killed", *RANDOM, PLANTED="SIGKILL,1,9")
    assert killed.returncode != 0
    _, _, root_cause = killed.stdout.partition("Root Cause")
    assert "rank      : 1" in root_cause
    assert "SIGKILL" in root_cause
    run_dir = home / "runs" / "small" / "killed"
    assert len(records_of(run_dir, "step")) == 4
    assert (run_dir / "checkpoints" / "step-000004").is_dir()


def test_an_interrupt_of_one_rank_ends_all_with_a_checkpoint(
    torchrun: Torchrun, whole: Path
) -> None:
    stopped = torchrun("run.id=stopped", *RANDOM[:-1], PLANTED="SIGINT,1,9")
    assert stopped.returncode != 0
    assert "interrupted: 5 steps" in stopped.stdout
    assert "resume with: torchrun --nproc-per-node 2 -m dovetail train" in stopped.stdout
    assert "exitcode  : 130" in stopped.stdout
    run_dir = whole.with_name("stopped")
    assert (run_dir / "checkpoints" / "step-000005").is_dir()
    assert torchrun("run.id=stopped", *RANDOM[:-1], "--resume", "stopped").returncode == 0
    assert_same_run(whole, run_dir)


@pytest.mark.parametrize("planted", ["SIGKILL,1,9", "raise,0,1"], ids=["killed", "at-once"])
def test_a_launcher_that_starts_over_goes_on_with_the_run_to_the_bit(
    torchrun: Torchrun, whole: Path, planted: str
) -> None:
    # Before the first checkpoint the run begins again, in its folder.
    name = f"restarted-{planted[:5]}"
    launch = ("--max-restarts", "1")
    done = torchrun(f"run.id={name}", *RANDOM, launch=launch, PLANTED=planted)
    assert done.returncode == 0, done.stdout
    run_dir = whole.with_name(name)
    assert done.stdout.count(f"run {Path('runs') / 'small' / name}\n450 parameters") == 2
    assert_same_run(whole, run_dir)


def test_errors_before_a_run_are_told_once_and_leave_nothing(
    torchrun: Torchrun, home: Path
) -> None:
    done = torchrun("run.id=refused", "data.kwargs.kind=stream", "train.schedule=constant")
    assert done.returncode != 0
    assert done.stdout.count("error: config distributed.data: nothing given") == 1
    assert "Traceback (most recent call last):\n  File" not in done.stdout.partition("exitcode")[0]
    assert not (home / "runs" / "small" / "refused").exists()


PLUGIN = """
from dovetail import hookimpl
import torch


class Stack:
    def __call__(self, samples):
        return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}


@hookimpl
def dovetail_collate(task):
    return Stack()
"""


def test_ranks_with_other_releases_of_a_plugin_are_refused(
    torchrun: Torchrun, tmp_path: Path
) -> None:
    for rank, version in enumerate(("1.0", "1.1")):
        site = tmp_path / str(rank)
        info = site / f"planted-{version}.dist-info"
        info.mkdir(parents=True)
        (site / "planted_stack.py").write_text(PLUGIN)
        metadata = f"Metadata-Version: 2.1\nName: planted\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text("[dovetail.collate]\nstack = planted_stack\n")
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    program = (str(tmp_path / "launcher.py"),)
    done = torchrun("collate.use=stack", program=program, SITES=str(tmp_path))
    assert done.returncode != 0
    message = "error: plugins of rank 1: differ from those of rank 0: collate plugin 'stack'"
    assert done.stdout.count(message) == 1
    assert "version was 1.0, is 1.1" in done.stdout


def test_progress_of_several_ranks_counts_the_batches_of_all(whole: Path) -> None:
    (last,) = sorted((whole / "checkpoints").glob("step-*"))[-1:]
    progress = json.loads((last / "progress.json").read_text())
    assert progress["num_ranks"] == 2
    assert progress["micro_step"] == 18
