from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dovetail import TaskSpec, TensorSpec
from dovetail.config import TrainingConfig, parse_config
from dovetail.errors import DataError
from dovetail.run.loader import (
    EpochLoader,
    EpochSampler,
    NamingCollator,
    as_splits,
    build_loader,
    build_prepare,
    length_of,
    mix_seed,
    name_tuple,
    primary_input,
)

CPU = torch.device("cpu")


class StackCollator:
    """Stacks mappings of numbers; travels to worker processes."""

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        return {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in samples[0]}


class Rows(Dataset[dict[str, Tensor]]):
    """Samples that say their own index."""

    def __init__(self, length: int, *, is_random: bool = False) -> None:
        self.length = length
        self.is_random = is_random
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        noise = torch.rand(()) if self.is_random else torch.zeros(())
        return {"features": torch.tensor(index) + noise, "labels": torch.tensor(index % 2)}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Samples without a length."""

    def __init__(self, length: int) -> None:
        self.num = length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"features": torch.tensor(i)} for i in range(self.num))


def config_of(**sections: Any) -> TrainingConfig:
    config, problems = parse_config({"run": {"seed": 3}, **sections})
    assert config is not None, problems
    return config


def loader_of(split: Any, *, is_training: bool = True, **sections: Any) -> EpochLoader:
    collator = None if isinstance(split, DataLoader) else StackCollator()
    sections = {"train": {"batch_size": 4}, **sections}
    return build_loader(split, config_of(**sections), collator, CPU, is_training=is_training)


def rows_of(batches: Iterator[dict[str, Tensor]]) -> list[float]:
    return [value for batch in batches for value in batch["features"].tolist()]


# --- the order


def test_every_epoch_is_a_permutation_of_its_own_and_the_same_for_the_same_seed() -> None:
    epochs = [rows_of(loader_of(Rows(23)).iterate(epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = loader_of(Rows(23))
    assert [rows_of(again.iterate(epoch)) for epoch in range(3)] == epochs
    assert rows_of(loader_of(Rows(23), run={"seed": 4}).iterate(0)) != epochs[0]


def test_order_does_not_depend_on_the_global_generator_nor_change_it() -> None:
    loader = loader_of(Rows(23))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = rows_of(loader.iterate(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert rows_of(loader.iterate(0)) == first


@pytest.mark.parametrize(
    ("is_training", "sections"), [(False, {}), (True, {"data": {"shuffle": False}})]
)
def test_evaluation_and_unshuffled_data_keep_their_order(
    is_training: bool, sections: dict[str, Any]
) -> None:
    loader = loader_of(Rows(9), is_training=is_training, **sections)
    assert rows_of(loader.iterate(0)) == rows_of(loader.iterate(1)) == list(range(9))


@settings(max_examples=30)
@given(length=st.integers(1, 30), batch_size=st.integers(1, 8), data=st.data())
def test_an_epoch_continues_exactly_where_it_was_left(
    length: int, batch_size: int, data: st.DataObject
) -> None:
    loader = loader_of(Rows(length), train={"batch_size": batch_size})
    whole = list(loader.iterate(2))
    assert loader.num_batches == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    rest = list(loader.iterate(2, start))
    assert [b["features"].tolist() for b in rest] == [b["features"].tolist() for b in whole[start:]]
    assert loader.num_batches == len(whole)


def test_batches_that_are_left_out_are_not_even_read() -> None:
    rows = Rows(12)
    list(loader_of(rows, data={"shuffle": False}).iterate(0, 2))
    assert rows.read == [8, 9, 10, 11]


def test_the_last_batch_may_be_short_and_evaluation_has_its_own_size() -> None:
    batches = list(loader_of(Rows(9)).iterate(0))
    assert [len(b["labels"]) for b in batches] == [4, 4, 1]
    loader = loader_of(Rows(9), is_training=False, train={"batch_size": 4, "eval_batch_size": 7})
    assert [len(b["labels"]) for b in loader.iterate(0)] == [7, 2]


def test_workers_give_the_same_batches_also_in_a_later_epoch_and_from_the_middle() -> None:
    alone, helped = loader_of(Rows(11)), loader_of(Rows(11), data={"num_workers": 2})
    for epoch, start in ((0, 0), (1, 0), (1, 1)):
        assert rows_of(helped.iterate(epoch, start)) == rows_of(alone.iterate(epoch, start))


def test_epoch_sampler_counts_what_is_left() -> None:
    sampler = EpochSampler(10, seed=0, shuffle=True)
    sampler.set_position(0, 7)
    assert len(sampler) == len(list(sampler)) == 3


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3))
def test_mixed_seeds_fit_every_generator(parts: list[int]) -> None:
    seed = mix_seed(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_mixed_seeds_of_neighbours_have_nothing_in_common() -> None:
    seeds = {mix_seed(seed, epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400


# --- streams and loaders of the user's own


def test_a_stream_has_no_length_and_is_left_out_by_reading() -> None:
    loader = loader_of(Stream(10))
    assert loader.num_batches is None
    assert rows_of(loader.iterate(0)) == list(range(10))
    assert rows_of(loader.iterate(0, 1)) == [4, 5, 6, 7, 8, 9]
    assert rows_of(loader.iterate(0, 99)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("has_generator", [False, True])
def test_a_loader_of_the_users_shuffles_anew_and_continues_exactly(
    has_generator: bool, num_workers: int
) -> None:
    generator = torch.Generator() if has_generator else None
    own: DataLoader[Any] = DataLoader(
        Rows(20), batch_size=3, shuffle=True, generator=generator, num_workers=num_workers
    )
    loader = loader_of(own)
    first, second = rows_of(loader.iterate(0)), rows_of(loader.iterate(1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert rows_of(loader.iterate(1, 3)) == second[9:]
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.num_batches == 7


def test_batches_left_out_by_reading_draw_nothing_from_the_restored_generator() -> None:
    own: DataLoader[Any] = DataLoader(Rows(20, is_random=True), batch_size=3, shuffle=True)
    loader = loader_of(own)
    torch.manual_seed(5)
    whole = loader.iterate(0)
    for _ in range(3):
        next(whole)
    state = torch.get_rng_state()
    rest = rows_of(whole)
    torch.set_rng_state(state)
    assert rows_of(loader.iterate(0, 3)) == rest


def test_a_sampler_or_data_set_with_epochs_of_its_own_hears_of_them() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

        def __len__(self) -> int:
            return 3

    sampler = Sampler()
    own: DataLoader[Any] = DataLoader(Rows(3), sampler=sampler)
    loader = loader_of(own)
    for epoch in (0, 1):
        rows_of(loader.iterate(epoch))
    assert sampler.epochs == [0, 1]


def test_tuples_of_a_users_loader_get_names() -> None:
    data = TensorDataset(torch.arange(4.0), torch.arange(4))
    (batch,) = loader_of(DataLoader(data, batch_size=4)).iterate(0)
    assert batch["features"].tolist() == [0, 1, 2, 3]
    assert batch["labels"].dtype is torch.int64


def test_a_users_batch_that_holds_no_tensor_is_told_with_its_key() -> None:
    own: DataLoader[Any] = DataLoader([{"text": "a"}, {"text": "b"}], batch_size=2)
    with pytest.raises(
        DataError, match="batch of the loader: key 'text' is a list; expected a tens"
    ):
        next(loader_of(own).iterate(0))


def test_a_users_batch_is_not_changed_by_the_loop() -> None:
    prepare = build_prepare(CPU, "features", is_named=False)
    assert prepare is not None
    given = {"features": torch.ones(1)}
    prepared = prepare(given)
    prepared["features"] = torch.zeros(1)
    assert given["features"].item() == 1


# --- samples


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"x": 1}, {"x": 1}),
        ((1, 2), {"pixels": 1, "labels": 2}),
        ([1, 2], {"pixels": 1, "labels": 2}),
        ((1,), {"pixels": 1}),
    ],
)
def test_name_tuple_names_input_and_labels(sample: Any, named: dict[str, int]) -> None:
    assert name_tuple(sample, "pixels") == named


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ((), "is a tuple of 0 items"),
        ((1, 2, 3), "is a tuple of 3 items; expected a mapping, or a tuple (pixels, labels)"),
        (np.zeros(2), "is a ndarray"),
        ("text", "is a str"),
        (None, "is a NoneType"),
    ],
)
def test_name_tuple_refuses_anything_else(sample: Any, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        name_tuple(sample, "pixels")
    assert str(caught.value).startswith(f"sample: {shown}")


def test_naming_collator_names_tuples_and_leaves_mappings_and_survives_pickling() -> None:
    collate = pickle.loads(pickle.dumps(NamingCollator(StackCollator(), "pixels")))
    assert collate([(1, 0), (2, 1)])["pixels"].tolist() == [1, 2]
    assert collate([{"a": 1}, {"a": 2}])["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (TaskSpec(), "features"),
        (TaskSpec(modality="vision"), "pixel_values"),
        (TaskSpec(modality="text"), "input_ids"),
        (TaskSpec(modality="audio"), "input_values"),
        (TaskSpec(modality="vision", inputs=(TensorSpec(name="img"),)), "img"),
    ],
)
def test_primary_input_is_the_tasks_first(task: TaskSpec, name: str) -> None:
    assert primary_input(task) == name


# --- what a data factory may return

DATA = Rows(3)
LOADER: DataLoader[Any] = DataLoader(DATA)
SAMPLES = [{"features": 1.0}]


@pytest.mark.parametrize(
    ("data", "train", "validation"),
    [
        ({"train": DATA}, DATA, None),
        ({"train": DATA, "validation": SAMPLES}, DATA, SAMPLES),
        ({"train": DATA, "val": SAMPLES}, DATA, SAMPLES),
        ({"train": DATA, "valid": SAMPLES}, DATA, SAMPLES),
        ({"train": DATA, "test": SAMPLES}, DATA, SAMPLES),
        ({"train": DATA, "validation": None}, DATA, None),
        ((DATA, SAMPLES), DATA, SAMPLES),
        ((DATA, None), DATA, None),
        (DATA, DATA, None),
        (SAMPLES, SAMPLES, None),
        ((LOADER, LOADER), LOADER, LOADER),
    ],
)
def test_as_splits_understands_mappings_pairs_and_single_data_sets(
    data: Any, train: Any, validation: Any
) -> None:
    splits = as_splits(data)
    assert splits.train is train
    assert splits.validation is validation
    assert splits.has_own_loaders is isinstance(train, DataLoader)


def test_as_splits_takes_streams_without_a_length() -> None:
    stream = Stream(3)
    assert as_splits(stream).train is stream
    assert as_splits(DataLoader(stream)).has_own_loaders


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({}, "factory: has the splits (none); expected a split 'train'"),
        ({"training": DATA}, "factory: has the splits 'training'; expected a split 'train'"),
        (
            {"train": DATA, "dev": DATA},
            "has the splits 'train', 'dev'; expected 'train' and one of",
        ),
        ({"train": []}, "factory split 'train': is empty; expected at least one sample. Check"),
        ({"train": DATA, "val": []}, "factory split 'validation': is empty"),
        ([], "factory split 'train': is empty"),
        (Rows(0), "factory split 'train': is empty"),
        (None, "factory split 'train': is a NoneType; expected a data set with __len__"),
        ({"train": None}, "factory split 'train': is a NoneType"),
        (3, "factory split 'train': is a int"),
        ("text", "factory split 'train': is a str"),
        ((s for s in SAMPLES), "factory split 'train': is a generator"),
        (({"a": 1}, {"a": 2}), "factory split 'train': is a dict"),
        ({"train": {"a": 1}}, "factory split 'train': is a dict"),
        ((DATA, DATA, DATA), "factory: is a tuple of 3 data sets or loaders; expected a mapping"),
        ([DATA, DATA], "factory: is a list of 2 data sets or loaders; expected a mapping with"),
        ([LOADER], "factory: is a list of 1 data sets or loaders"),
        ((LOADER, DATA), "factory: one split is a DataLoader, the other a data set; expected both"),
        ({"train": DATA, "val": LOADER}, "factory: one split is a DataLoader"),
    ],
)
def test_as_splits_says_what_it_cannot_understand(data: Any, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        as_splits(data, "factory")
    assert str(caught.value).startswith(shown) or shown in str(caught.value)


@pytest.mark.parametrize(
    ("data", "length"),
    [(DATA, 3), (SAMPLES, 1), (LOADER, 3), (Stream(3), None), (DataLoader(Stream(3)), None)],
)
def test_length_of_is_none_where_there_is_none(data: Any, length: int | None) -> None:
    assert length_of(data) == length


# --- batches for the bundle
