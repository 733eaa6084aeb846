from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    # TorchMetrics and others read their own packages' data in ways that newer Pythons deprecate.
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

import dovetail
from dovetail.run.tracking import read_records
from dovetail_lightning import DovetailModule, MetricLogCallback

os.environ.setdefault("OMP_NUM_THREADS", "1")

JOB = '''
import dovetail
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dropout=0.0, bad_passes=()):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3)
        self.bad_passes = bad_passes
        self.num_passes = 0

    def forward(self, features):
        x = self.body(features).tanh()
        dovetail.log_metric("size", x.abs().mean())
        if self.training:
            self.num_passes += 1
            if self.num_passes in self.bad_passes:
                x = x * float("nan")
        return self.head(self.drop(x))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def build(**arguments):
    return Net(**arguments)


def load(num=91, kind="samples"):
    """Samples, four in ten of them without a target: no two micro-batches have as many items."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(num + 37, 6, generator=generator)
    labels = features[:, :3].argmax(1)
    labels[torch.rand(num + 37, generator=generator) < 0.4] = -100
    samples = list(zip(features, labels.tolist()))
    train, validation = samples[:num], samples[num:]
    if kind == "stream":
        return Stream(train), Stream(validation)
    if kind == "loaders":
        return tuple(torch.utils.data.DataLoader(s, batch_size=8) for s in (train, validation))
    return {"train": train, "validation": validation}


def squared(outputs, batch):
    """A loss that counts items of its own, which nobody knows before the forward pass."""
    kept = outputs[:, 0] > 0
    count = kept.sum().clamp(min=1)
    return (outputs[:, 1].square() * kept).sum() / count, count
'''

CONFIG = """
[run]
name = "small"
seed = 3
report = false
[model]
factory = "lightning_job:build"
[data]
factory = "lightning_job:load"
[task]
modality = "tabular"
kind = "classification"
num_classes = 3
[train]
epochs = 2
batch_size = 8
lr = 0.02
device = "cpu"
warmup_ratio = 0.1
[collate]
use = "tabular"
[accumulate.exact]
steps = 4
[log]
system_s = 0
"""

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Job:
    """A config in a folder of its own, trained by Lightning or by dovetail."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def module(self, *overrides: str, **arguments: Any) -> DovetailModule:
        return DovetailModule.from_config(self.path, overrides, **arguments)

    def fit(
        self,
        *overrides: str,
        module: DovetailModule | None = None,
        ckpt_path: str | Path | None = None,
        **options: Any,
    ) -> SimpleNamespace:
        """Train on Lightning; return module, trainer and weights."""
        module = module or self.module(*overrides)
        trainer = pl.Trainer(**module.trainer_options(**(QUIET | options)))
        trainer.fit(module, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        weights = {k: v.clone() for k, v in module.model.state_dict().items()}
        return SimpleNamespace(module=module, trainer=trainer, weights=weights)

    def log(self, *overrides: str, **options: Any) -> SimpleNamespace:
        """Train on Lightning with the callback; return its records and folder too."""
        callback = MetricLogCallback()
        callbacks = [callback, *options.pop("callbacks", ())]
        fitted = self.fit(*overrides, callbacks=callbacks, **options)
        assert callback.run_dir is not None
        fitted.run_dir = callback.run_dir
        fitted.records = list(read_records(callback.run_dir))
        return fitted

    def train(self, *overrides: str) -> SimpleNamespace:
        """Train with dovetail's own loop; return the last weights and the records."""
        from safetensors.torch import load_file

        result = dovetail.train(self.path, overrides)
        assert result.last_checkpoint is not None
        weights = load_file(result.last_checkpoint / "model.safetensors")
        return SimpleNamespace(weights=weights, records=list(read_records(result.run_dir)))


class SaveAt(pl.Callback):
    """Saves a checkpoint after so many micro-batches."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number, self.count = path, number, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.count += 1
        if self.count == self.number:
            trainer.save_checkpoint(self.path)


def relative_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    vectors = [torch.cat([w[k].flatten().double() for k in expected]) for w in (found, expected)]
    return float((vectors[0] - vectors[1]).norm() / vectors[1].norm())


@pytest.fixture
def error_of() -> Callable[..., float]:
    """Relative error of weights."""
    return relative_error


@pytest.fixture
def save_at() -> type[SaveAt]:
    """Callback that saves a checkpoint at a path after so many micro-batches."""
    return SaveAt


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    (tmp_path / "lightning_job.py").write_text(JOB)
    (tmp_path / "config.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    yield Job(tmp_path / "config.toml")
    sys.modules.pop("lightning_job", None)
