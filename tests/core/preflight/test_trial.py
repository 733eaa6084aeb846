"""The first batch is tried, measured, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import dovetail
from dovetail.config import TrainingConfig
from dovetail.errors import ConfigError, ModelError
from dovetail.preflight import try_one_batch
from dovetail.run.flops import FlopMeter
from dovetail.run.loader import EpochLoader, build_loader
from dovetail.run.losses import build_objective
from dovetail.task import TaskSpec

TASK = TaskSpec(modality="tabular", kind="classification", num_classes=2)


@pytest.fixture
def loader() -> EpochLoader:
    samples = [{"features": torch.full((6,), float(n)), "labels": n % 2} for n in range(20)]
    config = TrainingConfig.model_validate({"task": {"modality": "tabular"}})
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_size": 8}), "task": TASK}
    )
    return build_loader(samples, config, default_collate, torch.device("cpu"), is_training=True)


class Noisy(nn.Module):
    """Draws numbers of every kind at each call, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        noise = torch.randn_like(features) * float(np.random.rand())
        logits: Tensor = self.layers(features + noise)
        return logits


def look(model: nn.Module) -> list[Any]:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.get_rng_state().tolist(),
        {k: v.tolist() for k, v in model.state_dict().items() if k != "calls"},
        [module.training for module in model.modules()],
    ]


def test_try_one_batch_measures_it_and_changes_no_number(loader: EpochLoader) -> None:
    model, meter = Noisy(), FlopMeter()
    before = look(model)
    names = try_one_batch(model, loader, TASK, build_objective(TASK, "task"), None, meter)
    assert names == ["val/loss", "val/accuracy"]
    assert meter.count is not None
    assert (meter.count.forward, meter.count.num_elements) == (2 * 8 * (6 * 16 + 16 * 2), 48)
    assert look(model) == before
    # The pass under the counter took its mark back; the trial itself was one call.
    assert float(model.calls) == 1


def test_try_one_batch_measures_the_elements_that_come_from_the_loader(
    loader: EpochLoader,
) -> None:
    class Doubled(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.cat([features, features], 1)

    model, meter = nn.Linear(12, 2), FlopMeter()
    objective = build_objective(TASK, "task")
    try_one_batch(model, loader, TASK, objective, ("features", Doubled()), meter)
    assert meter.count is not None
    assert (meter.count.forward, meter.count.num_elements) == (2 * 8 * 12 * 2, 48)


def test_try_one_batch_without_a_meter_runs_the_model_once(loader: EpochLoader) -> None:
    model = Noisy()
    assert try_one_batch(model, loader, TASK, build_objective(TASK, "task"), None) == [
        "val/loss",
        "val/accuracy",
    ]
    assert float(model.calls) == 1


def test_try_one_batch_learns_the_names_that_the_model_logs(loader: EpochLoader) -> None:
    class Telling(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            dovetail.log_metric("spread", features.std())
            dovetail.log_metric("heads/first", 1.0)
            return super().forward(features)

    names = try_one_batch(Telling(6, 2), loader, TASK, build_objective(TASK, "task"), None)
    assert names == ["val/loss", "val/accuracy", "val/spread", "heads/first"]


def test_try_one_batch_refuses_a_model_that_logs_a_name_of_the_run(loader: EpochLoader) -> None:
    class Claiming(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            dovetail.log_metric("accuracy", 1.0)
            return super().forward(features)

    with pytest.raises(ConfigError, match="val/accuracy"):
        try_one_batch(Claiming(6, 2), loader, TASK, build_objective(TASK, "task"), None)


def test_try_one_batch_names_the_model_that_fails(loader: EpochLoader) -> None:
    with pytest.raises(ModelError, match="model Linear: fails on the first batch"):
        try_one_batch(
            nn.Linear(5, 2), loader, TASK, build_objective(TASK, "task"), None, FlopMeter()
        )
