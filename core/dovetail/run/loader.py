"""Data: the splits a factory returns, how they are read, and their way to the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from dovetail.config import TrainingConfig
from dovetail.errors import DataError, build_message
from dovetail.run.agreement import WorkerCheck
from dovetail.run.checkpoint import random_state, set_random_state
from dovetail.run.distributed import ALONE, Ranks
from dovetail.run.naming import Batch, NamingCollator, name_tuple
from dovetail.run.shards import (
    Sharding,
    check_lengths,
    choose_sharding,
    deal,
    share_out,
)
from dovetail.task import TaskSpec
from dovetail.types import Collator

_VALIDATION_NAMES = ("validation", "val", "valid", "test")
_PRIMARY_INPUTS = {"vision": "pixel_values", "text": "input_ids", "audio": "input_values"}


@dataclass(frozen=True)
class Splits:
    """What the data factory returned: data sets, or loaders of the user's own."""

    train: Any
    validation: Any | None

    @property
    def has_own_loaders(self) -> bool:
        """Whether the batches are the user's, so that no collator is needed."""
        return isinstance(self.train, DataLoader)


def as_splits(data: Any, where: str = "data") -> Splits:
    """Understand what a data factory returned.

    Args:
        data: A mapping with "train" and perhaps "validation" (or "val", "valid", "test"), a pair
            `(train, validation)`, or one data set. Each is a map-style or iterable data set, a
            sequence of samples, or a `DataLoader`.
        where: What returned it, for messages.

    Raises:
        DataError: It is something else, there is no training split, or a split is empty.
    """
    if isinstance(data, Mapping):
        if "train" not in data:
            found = f"has the splits {', '.join(map(repr, data)) or '(none)'}"
            raise DataError(build_message(where, found, "a split 'train'"))
        unknown = [k for k in data if k != "train" and k not in _VALIDATION_NAMES]
        names = [n for n in _VALIDATION_NAMES if n in data]
        if unknown:
            found = f"has the splits {', '.join(map(repr, data))}"
            expected = f"'train' and one of {', '.join(map(repr, _VALIDATION_NAMES))}"
            raise DataError(build_message(where, found, expected))
        if len(names) > 1:
            found = f"has the splits {', '.join(map(repr, data))}; only {names[0]!r} is evaluated"
            warnings.warn(build_message(where, found), stacklevel=2)
        splits = Splits(data["train"], data[names[0]] if names else None)
    elif isinstance(data, tuple) and len(data) == 2:
        splits = Splits(*data)
    elif isinstance(data, tuple | list) and any(isinstance(d, Dataset | DataLoader) for d in data):
        found = f"is a {type(data).__name__} of {len(data)} data sets or loaders"
        expected = "a mapping with 'train' and perhaps 'validation', or a pair (train, validation)"
        raise DataError(build_message(where, found, expected))
    else:
        splits = Splits(data, None)
    _check_split(splits.train, f"{where} split 'train'")
    if splits.validation is not None:
        _check_split(splits.validation, f"{where} split 'validation'")
        if isinstance(splits.validation, DataLoader) is not splits.has_own_loaders:
            found = "one split is a DataLoader, the other a data set"
            raise DataError(build_message(where, found, "both loaders or both data sets"))
    return splits


def _check_split(split: Any, where: str) -> None:
    is_readable = isinstance(split, DataLoader | IterableDataset) or (
        hasattr(split, "__getitem__") and hasattr(split, "__len__")
    )
    if not is_readable or isinstance(split, Mapping | str):
        expected = "a data set with __len__ and __getitem__, an IterableDataset or a DataLoader"
        raise DataError(build_message(where, f"is a {type(split).__name__}", expected))
    if length_of(split) == 0:
        hint = "Check the data factory and its arguments."
        raise DataError(build_message(where, "is empty", "at least one sample", hint))


def length_of(data: Any) -> int | None:
    """Return the length of a data set or loader, or `None` where it has none."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # an IterableDataset behind a DataLoader
        return None


def primary_input(task: TaskSpec) -> str:
    """Return the name of the task's first input."""
    if task.inputs:
        return task.inputs[0].name
    return _PRIMARY_INPUTS.get(task.modality, "features")


class EpochSampler(Sampler[int]):
    """Indices of one epoch: a permutation that depends on seed and epoch alone.

    Args:
        length: Number of samples.
        seed: Seed of the run.
        shuffle: Whether to permute.
        batch_size: Samples of the batches that are dealt to the ranks.
        ranks: Who reads them; each gets its own.
    """

    def __init__(
        self, length: int, seed: int, shuffle: bool, batch_size: int = 1, ranks: Ranks = ALONE
    ) -> None:
        self.length = length
        self._batch_size = batch_size
        self._ranks = ranks
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its samples are already done, by all ranks."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        left = range(self._start, self.length)
        return (
            len(left) if self._ranks.size == 1 else len(deal(left, self._batch_size, self._ranks))
        )

    def __iter__(self) -> Iterator[int]:
        order: Sequence[int] = range(self.length)
        if self._shuffle:
            generator = torch.Generator()
            generator.manual_seed(mix_seed(self._seed, self._epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        return iter(deal(order[self._start :], self._batch_size, self._ranks))


def mix_seed(*parts: int) -> int:
    """Return one 63-bit seed from several numbers, without relations between neighbours.

    Source: `numpy.random.SeedSequence`.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EpochLoader:
    """Batches of a split, epoch by epoch.

    Args:
        loader: The loader that is read.
        sampler: Its sampler where it is ours; a loader of the user's own has none.
        batch_size: Samples per batch where it is known.
        prepare: What is done to each batch: names for tuples, the way to the device.
        seed: Seed of the workers' random generators.
        ranks: Who reads the split together.
        sharding: How they divide what has no sampler of ours.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: EpochSampler | None,
        batch_size: int | None,
        prepare: Callable[[Any], Batch] | None,
        seed: int,
        ranks: Ranks = ALONE,
        sharding: Sharding | None = None,
    ) -> None:
        self.loader = loader
        self._sampler = sampler
        self._batch_size = batch_size
        self._prepare = prepare
        self._seed = seed
        self._ranks = ranks
        self._sharding = sharding
        # Once, as the ranks agree about it: each may have another part.
        self._length = length_of(loader) if sampler is None else None
        if sharding == "own":
            lengths = [length for length in ranks.gather(self._length) if length is not None]
            self._length = sum(lengths) if len(lengths) == ranks.size else None

    @property
    def num_batches(self) -> int | None:
        """Batches of a whole epoch, those of all ranks, or `None` where the data have no length."""
        if self._sampler is not None and self._batch_size is not None:
            return -(-self._sampler.length // self._batch_size)
        return length_of(self.loader) if self._sharding is None else self._length

    @property
    def is_length_exact(self) -> bool:
        """Whether `num_batches` is more than a guess, as it is for a stream."""
        is_stream = isinstance(self.loader.dataset, IterableDataset)
        return not is_stream and self._sharding is None and self.num_batches is not None

    def num_left(self, start: int) -> int:
        """Return how many batches a rank yields after the first `start` of all ranks'."""
        return -(-((self.num_batches or 0) - start) // self._ranks.size)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Batches to leave out at its beginning, those of all ranks. Where the sampler is
                ours they are not even read.
        """
        ranks, num_skipped = self._ranks, start
        if self._sampler is not None and self._batch_size is not None:
            self._sampler.set_position(epoch, start * self._batch_size)
            num_skipped = 0
        for part in (self.loader.sampler, self.loader.dataset):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        if self.loader.generator is not None:
            # A loader that is read from its beginning must shuffle as it did when the epoch began.
            parts = [self._seed, epoch, start - num_skipped]
            if self._sampler is not None and ranks.rank:  # its order is not drawn from this
                parts.append(ranks.rank)
            self.loader.generator.manual_seed(mix_seed(*parts))
        batches: Iterator[Any] = iter(self.loader)
        if self._sharding == "own":
            num_skipped //= ranks.size
        if num_skipped:
            # Whatever reading them draws was drawn before the generators' states were saved.
            state = random_state()
            for _ in range(num_skipped):
                next(batches, None)
            set_random_state(state)
        left = (self.num_batches or 0) - start
        return share_out(batches, left, ranks, self._sharding, self._prepare)


def build_loader(
    split: Any,
    config: TrainingConfig,
    collator: Collator | None,
    device: torch.device,
    *,
    is_training: bool,
    worker_check: WorkerCheck | None = None,
    ranks: Ranks = ALONE,
) -> EpochLoader:
    """Build the loader of a split.

    Args:
        split: A data set, or a loader of the user's own, which is taken as it is but for its
            shuffling: without a generator of its own it gets one that the run's seed decides.
        config: The run's config.
        collator: Makes batches of samples; `None` for a loader of the user's own.
        device: Where the batches go.
        is_training: Whether to shuffle.
        worker_check: What each worker does first.
        ranks: Who reads the split together; all of them call this together.

    Raises:
        ConfigError: Nobody has said how the ranks divide a stream, or a loader of the user's own.
        DataError: The ranks have data sets of different lengths.
    """
    name = primary_input(config.task)
    seed = config.run.seed
    sharding = choose_sharding(split, config.distributed.data, ranks)
    prepare = build_prepare(device, name, is_named=collator is not None)
    if isinstance(split, DataLoader):
        _give_generator(split)
        return EpochLoader(split, None, None, prepare, seed, ranks, sharding)
    train = config.train
    batch_size = train.batch_size if is_training else (train.eval_batch_size or train.batch_size)
    owner = "the collator" if worker_check is None else worker_check.plugin
    sampler: EpochSampler | None = None
    if not isinstance(split, IterableDataset):
        check_lengths(ranks.gather(len(split)), "train" if is_training else "validation")
        shuffle = is_training and config.data.shuffle
        sampler = EpochSampler(len(split), seed, shuffle, batch_size, ranks)
    loader: DataLoader[Any] = DataLoader(
        split,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=config.data.num_workers,
        collate_fn=None if collator is None else NamingCollator(collator, name, owner),
        worker_init_fn=worker_check,
        pin_memory=device.type == "cuda",
        persistent_workers=config.data.num_workers > 0,
        # The workers' seeds come from here and not from the global generator, so that loading
        # draws nothing from what dropout uses.
        generator=torch.Generator(),
    )
    return EpochLoader(loader, sampler, batch_size, prepare, seed, ranks, sharding)


def _give_generator(loader: DataLoader[Any]) -> None:
    """Let a loader draw its order from a generator of its own, so that a resumed run repeats it."""
    if loader.generator is None:
        loader.generator = torch.Generator()
        if isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is None:
            loader.sampler.generator = loader.generator


def build_prepare(
    device: torch.device, name: str, *, is_named: bool
) -> Callable[[Any], Batch] | None:
    """Return what brings a batch to the device, or `None` where nothing is to be done."""
    if is_named and device.type == "cpu":
        return None

    def prepare(batch: Any) -> Batch:
        named = name_tuple(batch, name)
        for key, value in named.items():
            if not isinstance(value, Tensor):
                found = f"key {key!r} is a {type(value).__name__}"
                raise DataError(build_message("batch of the loader", found, "a tensor"))
        return {k: v.to(device, non_blocking=True) for k, v in named.items()}

    return prepare
