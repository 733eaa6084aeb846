"""Runs on disks that are full, or read-only: real limits of the kernel, set for a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dovetail
from dovetail.errors import RunError
from dovetail.run.tracking import read_records

# Trains for some hundred steps on a disk that takes no more than a limit, and tells how it went.
PROGRAM = """
import json, sys, warnings
from pathlib import Path
import torch
import dovetail
from dovetail import hookimpl
from dovetail.registry import Registry
from dovetail.run.observer import RunObserver

class Stack:
    @hookimpl
    def dovetail_collate(self):
        return lambda samples: {k: torch.stack([s[k] for s in samples]) for k in samples[0]}

registry = Registry()
registry.register(Stack(), hook="collate", name="tabular")
samples = [{"features": torch.randn(6), "labels": torch.tensor(n % 2)} for n in range(400)]
config = {
    "run": {"dir": sys.argv[1], "id": "one", "report": False},
    "train": {"batch_size": 1, "epochs": 2, "schedule": "constant"},
    "accumulate": {"exact": {"steps": 1}},
    "log": {"system_s": 0.0},
    "export": {"use": []},
}
told = {"model": None}
observer = RunObserver()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    LIMIT
    try:
        parts = {"model": torch.nn.Linear(6, 2), "data": {"train": samples}}
        result = dovetail.train(config, registry=registry, observer=observer, **parts)
        told |= {"status": result.status, "num_steps": result.num_steps}
        told |= {"checkpoint": result.last_checkpoint.name}
    except dovetail.DovetailError as err:
        told |= {"error": type(err).__name__, "message": str(err)}
told["warnings"] = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
print(json.dumps(told))
"""

FILE_SIZE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
"""No file may grow beyond 64 KiB: checkpoints of the small model fit, the log does not."""


def run_program(program: str, directory: Path, *, before: tuple[str, ...] = ()) -> dict[str, Any]:
    command = [*before, sys.executable, "-c", program, str(directory)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_run_goes_on_when_the_log_cannot_grow_and_states_the_loss_at_the_end(
    tmp_path: Path,
) -> None:
    told = run_program(PROGRAM.replace("LIMIT", FILE_SIZE), tmp_path)
    assert (told["status"], told["num_steps"]) == ("completed", 800)
    run = tmp_path / "run" / "one"
    assert (run / "metrics.jsonl").stat().st_size <= 65536
    # What stands in the log is whole, from the first record on, without a torn line.
    records = list(read_records(run))
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps[:100] == list(range(1, 101))
    assert steps == sorted(set(steps))  # a short record may find place where a longer one did not
    assert len(steps) < 800
    first, last = told["warnings"]
    assert "metrics.jsonl': cannot be written: File too large; the run goes on" in first
    # Beside the steps there are the records of the settings and of the end.
    num_lost = 800 + 2 - len(records)
    assert f"metrics.jsonl': lacks {num_lost} records that could not be written" in last


@pytest.fixture
def small_disk(tmp_path: Path) -> tuple[str, ...]:
    """A command that runs another one with a file system of 300 KiB at `tmp_path / "disk"`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    return _in_namespace(f"mount -t tmpfs -o size=300k none {disk}")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> tuple[str, ...]:
    """A command that runs another one with a read-only file system at `tmp_path / "disk"`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    return _in_namespace(f"mount -t tmpfs -o ro none {disk}")


def _in_namespace(mount: str) -> tuple[str, ...]:
    tool = shutil.which("unshare")
    if tool is None:
        pytest.skip("needs unshare of util-linux")
    command = (tool, "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    return command


def test_run_on_a_full_disk_ends_at_its_last_checkpoint_and_states_what_the_log_lacks(
    tmp_path: Path, small_disk: tuple[str, ...]
) -> None:
    # Whatever fills the disk: here it is full before the first checkpoint.
    fill = "disk = Path(sys.argv[1]); (disk / 'filler').write_bytes(bytes(230 * 1024))"
    told = run_program(PROGRAM.replace("LIMIT", fill), tmp_path / "disk", before=small_disk)
    assert told["error"] == "CheckpointError"
    assert "cannot be written: " in told["message"]
    assert "If the disk is full, free space" in told["message"]
    first, second, last = told["warnings"]
    assert "metrics.jsonl': cannot be written: No space left on device; the run goes on" in first
    assert "checkpoint " in second
    assert second.endswith("The run goes on, and tries again at its next checkpoint.")
    assert "metrics.jsonl': lacks " in last


def test_run_completes_when_a_full_disk_is_freed_before_its_last_checkpoint(
    tmp_path: Path, small_disk: tuple[str, ...]
) -> None:
    fill = """
    filler = Path(sys.argv[1]) / 'filler'
    filler.write_bytes(bytes(230 * 1024))
    class Freeing(RunObserver):
        def on_step(self, epoch, micro_batch, step, metrics):
            if step == 500:
                filler.unlink()
    observer = Freeing()
    """
    told = run_program(PROGRAM.replace("    LIMIT", fill), tmp_path / "disk", before=small_disk)
    assert (told["status"], told["num_steps"]) == ("completed", 800)
    assert told["checkpoint"] == "step-000800"
    assert ["metrics.jsonl" in text for text in told["warnings"]] == [True, False, True]


def test_run_on_a_read_only_disk_is_refused_before_training(
    tmp_path: Path, read_only_disk: tuple[str, ...]
) -> None:
    told = run_program(PROGRAM.replace("LIMIT", ""), tmp_path / "disk", before=read_only_disk)
    assert told["error"] == "RunError"
    folder = tmp_path / "disk" / "run" / "one"
    assert told["message"] == (
        f"run folder {str(folder)!r}: cannot be made: Read-only file system. "
        "Choose another run.dir."
    )
    assert told["warnings"] == []


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="has no file system of the kernel")
def test_run_in_a_folder_that_nobody_may_write_is_refused_before_training(
    config: dict[str, Any], registry: Any, splits: dict[str, Any]
) -> None:
    model = nn.Linear(6, 2)
    before = model.weight.detach().clone()
    # Not even the superuser makes folders there.
    config["run"]["dir"] = "/sys/kernel/runs"
    with pytest.raises(RunError, match=r"run folder '/sys/kernel/runs/.*': cannot be made: .*"):
        dovetail.train(config, model=model, data=splits, registry=registry)
    assert torch.equal(model.weight, before)
