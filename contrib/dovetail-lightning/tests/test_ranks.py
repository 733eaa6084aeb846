"""Two processes that Lightning's own launcher starts, on loopback and the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = """
import sys

import lightning.pytorch as pl
import torch

from dovetail_lightning import DovetailModule, MetricLogCallback

module = DovetailModule.from_config("config.toml", sys.argv[1:])
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
log = MetricLogCallback()
options = module.trainer_options(devices=2, strategy="ddp", callbacks=[log], **options)
trainer = pl.Trainer(**options)
syncs = []


def count(state, bucket):
    syncs.append(bucket.index())
    return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)


class Counter(pl.Callback):
    def on_train_start(self, trainer, module):
        trainer.model.register_comm_hook(None, count)


trainer.callbacks.append(Counter())
trainer.fit(module)
if trainer.is_global_zero:
    torch.save(
        {
            "weights": module.model.state_dict(),
            "run_dir": str(log.run_dir),
            "num_syncs": len(syncs),
            "evaluation": module.last_evaluation,
        },
        "result.pt",
    )
"""


def test_two_ranks_step_as_one_process_that_accumulates_twice_as_long(
    job: Any, error_of: Any, tmp_path: Path
) -> None:
    """Of 11 micro-batches, rank 1 has one less, and the last window one of four."""
    (tmp_path / "script.py").write_text(SCRIPT)
    overrides = ["data.kwargs.num=83", "train.optimizer=sgd", "train.lr=0.5"]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "script.py", "accumulate.exact.steps=2", *overrides],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "result.pt")
    expected = job.train("accumulate.exact.steps=4", *overrides)
    assert error_of(found["weights"], expected.weights) <= 1e-6
    assert found["num_syncs"] == 6  # one round per window

    lines = (tmp_path / found["run_dir"] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["kind"] for r in records] == [r["kind"] for r in expected.records]
    for record, wanted in zip(records, expected.records, strict=True):
        assert record.get("items") == wanted.get("items")
        for name, value in wanted.get("metrics", {}).items():
            if name not in ("train/size", "val/size"):  # each rank logs for itself
                assert abs(record["metrics"][name] - value) <= 1e-6 * abs(value)
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 2
