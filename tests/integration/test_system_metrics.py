"""System metrics of real runs: they are there, and no number of the training knows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import dovetail
from dovetail.run.tracking import read_records

Train = Callable[..., dovetail.TrainingResult]

# The model has batch normalisation, whose statistics show what runs once more than it should.
pytestmark = pytest.mark.filterwarnings("ignore:accumulation cannot equal the large batch")


def build_model() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


@pytest.fixture
def train(config: dict[str, Any], registry: Any, splits: dict[str, Any]) -> Train:
    def run(*overrides: str, **kwargs: Any) -> dovetail.TrainingResult:
        own = {"run": {**config["run"], "report": False}, "export": {"use": []}}
        arguments = {"model": build_model(), "data": splits, "registry": registry, **kwargs}
        return dovetail.train({**config, **own}, overrides, **arguments)

    return run


def records_of(result: dovetail.TrainingResult, *kinds: str) -> list[Mapping[str, Any]]:
    return [r for r in read_records(result.run_dir) if r["kind"] in kinds]


def weights_of(result: dovetail.TrainingResult) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
# The monitor is a thread, and the workers of an evaluation are forked while it runs.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_training_is_the_same_to_the_bit_with_system_metrics_and_without(
    train: Train, workers: int
) -> None:
    settings = f"data.num_workers={workers}"
    without = train(settings, "log.system_s=0")
    beside = train(settings, "log.system_s=0.01")
    assert records_of(without, "system") == []
    assert records_of(beside, "system") != []
    assert weights_of(beside) == weights_of(without)
    kinds = ("step", "evaluation")
    numbers = [r["metrics"] for r in records_of(without, *kinds)]
    assert [r["metrics"] for r in records_of(beside, *kinds)] == numbers
    assert len(numbers) == 9 + 3


def test_run_has_system_metrics_of_the_whole_training_at_least_once(train: Train) -> None:
    result = train("log.system_s=3600")
    (record,) = records_of(result, "system")
    metrics = record["metrics"]
    assert record["step"] == result.num_steps == 9
    assert metrics["system/memory_gib"] > 0
    seconds = 9 / metrics["system/steps_per_s"]
    assert metrics["system/items_per_s"] * seconds == pytest.approx(3 * 91)
    assert 0 <= metrics["system/data_wait_percent"] <= 100
    # Two FLOPs a product, once for the forward and twice for the backward pass.
    flops = 3 * 2 * (6 * 16 + 16 * 2) * 3 * 91
    assert metrics["system/model_tflops_per_s"] * seconds * 1e12 == pytest.approx(flops)
    assert "system/mfu_percent" not in metrics


def test_resumed_run_counts_its_own_steps_alone(train: Train) -> None:
    first = train("log.system_s=3600")
    resumed = train("log.system_s=3600", "train.epochs=4", resume=first.run_dir)
    record = records_of(resumed, "system")[-1]
    assert record["step"] == 12
    seconds = 3 / record["metrics"]["system/steps_per_s"]
    assert record["metrics"]["system/items_per_s"] * seconds == pytest.approx(91)
