"""Batches of real samples in chosen sizes, from every kind of split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dovetail.run.samples import take_batches, vary_lengths

ROWS = [{"features": torch.tensor(float(index))} for index in range(10)]


def stack(samples: Sequence[Any]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in samples[0]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(ROWS[: self.length])


@pytest.mark.parametrize(
    ("split", "collator"),
    [
        (ROWS[:10], stack),
        (Stream(10), stack),
        (DataLoader(ROWS[:10], batch_size=10), None),
        ([{"features": float(i)} for i in range(10)], stack),
        ([(float(i), i) for i in range(10)], stack),
    ],
)
def test_take_batches_gives_consecutive_samples_in_the_sizes_asked_for(
    split: Any, collator: Any
) -> None:
    batches = take_batches(split, collator, "features", [1, 3, 2])
    assert [b["features"].tolist() for b in batches] == [[0], [1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("split", "collator"),
    [
        (ROWS[:2], stack),
        (Stream(2), stack),
        (DataLoader(ROWS[:9], batch_size=2), None),
    ],
)
def test_take_batches_repeats_samples_where_there_are_too_few(split: Any, collator: Any) -> None:
    batches = take_batches(split, collator, "features", [1, 4])
    assert [b["features"].tolist() for b in batches] == [[0], [1, 0, 1, 0]]


def test_take_batches_names_the_tuples_of_a_users_loader() -> None:
    own: DataLoader[Any] = DataLoader(
        TensorDataset(torch.arange(3.0), torch.arange(3)), batch_size=3
    )
    (batch,) = take_batches(own, None, "pixels", [2])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "pixels": [0, 1],
        "labels": [0, 1],
    }


@pytest.mark.parametrize("is_left", [False, True])
def test_vary_lengths_cuts_every_second_batch_of_fixed_length(is_left: bool) -> None:
    tokens = torch.arange(20).reshape(2, 10)
    mask = torch.ones_like(tokens)
    mask[:, 0 if is_left else -1] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    whole, cut = vary_lengths([batch, batch], "input_ids")
    assert whole is batch
    assert torch.equal(cut["input_ids"], tokens[:, 5:] if is_left else tokens[:, :5])
    assert cut["attention_mask"].all()
    assert cut["labels"] is batch["labels"]


def test_vary_lengths_leaves_batches_that_vary_already() -> None:
    batches = [{"input_ids": torch.zeros(2, n, dtype=torch.int64)} for n in (3, 5)]
    assert vary_lengths(batches, "input_ids") == batches
