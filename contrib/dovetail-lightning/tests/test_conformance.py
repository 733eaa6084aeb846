"""What the Trainer does with a config is what `dovetail train` does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

NO_TIMES = ("time", "wait_s", "params")


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in NO_TIMES} for record in records]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["accumulate.exact.steps=1"],
        ["model.kwargs.dropout=0.2", "accumulate.exact.max_grad_norm=0.1"],
        ["train.optimizer=sgd", "train.optimizer_kwargs.momentum=0.9", "train.lr=0.5"],
        ["train.precision=bf16"],
    ],
    ids=["plain", "one step", "dropout and clip", "sgd", "bf16"],
)
def test_module_trains_to_the_same_bits_and_records(job: Any, overrides: list[str]) -> None:
    found, expected = job.log(*overrides), job.train(*overrides)
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight)
    assert plain(found.records) == plain(expected.records)


def test_module_ends_after_max_steps(job: Any) -> None:
    """In the middle of an epoch, where Lightning does not evaluate and dovetail does."""
    found, expected = job.log("train.max_steps=4"), job.train("train.max_steps=4")
    *whole, last, end = plain(expected.records)
    assert (last["kind"], last["step"]) == ("evaluation", 4)
    assert plain(found.records) == [*whole, end]


def test_module_follows_windows_that_lightning_lengthens(job: Any, error_of: Any) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    wanted = ["train.schedule=constant", "train.warmup_ratio=0"]
    scheduler = GradientAccumulationScheduler({0: 2, 1: 5})
    found = job.fit("accumulate.exact.steps=1", *wanted, callbacks=[scheduler])
    job.path.write_text(job.path.read_text().replace("steps = 4", "steps = { 0 = 2, 6 = 5 }"))
    assert error_of(found.weights, job.train(*wanted).weights) <= 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        ["accumulate.exact.steps=3"],
        ["accumulate.exact.steps=5", "train.optimizer=sgd", "train.lr=0.5"],
        ["data.kwargs.kind=loaders"],
        ["data.kwargs.kind=stream", "train.schedule=constant", "train.warmup_ratio=0"],
        ["train.loss=lightning_job:squared"],
    ],
    ids=["three", "five", "loaders", "stream", "items of the loss"],
)
def test_module_trains_exactly(job: Any, error_of: Any, overrides: list[str]) -> None:
    assert error_of(job.fit(*overrides).weights, job.train(*overrides).weights) <= 1e-6


def test_tail_of_one_micro_batch_counts_by_its_items(job: Any, error_of: Any) -> None:
    """Of 12 micro-batches, 11 are a window, and one is a window of its own."""
    wanted = ["accumulate.exact.steps=11", "train.optimizer=sgd", "train.lr=0.5"]
    large = ["accumulate.exact.steps=1", "data.shuffle=false", "train.batch_size=88", *wanted[1:]]
    found = job.fit("data.shuffle=false", *wanted)
    assert found.module.num_steps == 4
    assert error_of(found.weights, job.train(*large).weights) <= 1e-6
