from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from dovetail.errors import LockError
from dovetail.registry import PluginInfo
from dovetail.registry.lock import files_digest
from dovetail.run.agreement import WorkerCheck, check_ranks

RANK = """
import json, os, sys
import torch.distributed as dist
from dovetail.errors import LockError
from dovetail.run.agreement import check_ranks

rank, store, versions = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
store = dist.FileStore(store, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
try:
    check_ranks([{"hook": "collate", "name": "radar", "version": versions[rank]}])
    print("agreed", flush=True)
except LockError as err:
    print(err, flush=True)
# Who leaves first takes the connections with him, whatever the other still waits for.
dist.barrier()
os._exit(0)  # torch 2.7 may hang for good when it takes a group of gloo down
"""


def run_ranks(tmp_path: Path, versions: Sequence[str]) -> list[str]:
    """Return what each of two ranks prints."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), json.dumps(versions)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return printed


def test_ranks_with_the_same_plugins_agree(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, ["1.0", "1.0"]) == ["agreed", "agreed"]


def test_every_rank_stops_when_one_has_another_release(tmp_path: Path) -> None:
    message = (
        "plugins of rank 1: differ from those of rank 0: collate plugin 'radar': version was 1.0, "
        "is 1.1. Install the same releases on every machine."
    )
    assert run_ranks(tmp_path, ["1.0", "1.1"]) == [message, message]


def test_a_single_process_has_nobody_to_ask() -> None:
    check_ranks([{"hook": "collate", "name": "radar"}])


@pytest.fixture
def radar(site: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, WorkerCheck]:
    """A planted collator's file, and the check that a run with it gives its workers."""
    site.add_module("planted_radar", "x = 1\n")
    # A worker that is started anew looks for modules where the environment says.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site.path), *sys.path]))
    info = PluginInfo("collate", "radar", "acme", "1.2", "planted_radar:plugin")
    row = {"hook": "collate", "name": "radar", "files_sha256": files_digest(info.value)}
    return site.path / "planted_radar.py", WorkerCheck.of(info, [row])


def batches(check: WorkerCheck, context: str) -> list[Any]:
    loader = DataLoader(
        [1, 2], num_workers=1, multiprocessing_context=context, worker_init_fn=check
    )
    return [batch.item() for batch in loader]


def test_workers_work_while_the_files_are_what_they_were(radar: tuple[Path, WorkerCheck]) -> None:
    assert batches(radar[1], "spawn") == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_worker_goes_on_with_the_code_that_is_loaded(
    radar: tuple[Path, WorkerCheck],
) -> None:
    path, check = radar
    path.write_text("x = 2\n")
    assert batches(check, "fork") == [1, 2]


def test_a_worker_that_would_import_other_files_stops_the_run(
    radar: tuple[Path, WorkerCheck],
) -> None:
    path, check = radar
    path.write_text("x = 2\n")
    with pytest.raises(LockError, match="its files were changed since the run began") as caught:
        batches(check, "spawn")
    assert "data worker 0: plugin 'radar' (acme 1.2)" in str(caught.value)
