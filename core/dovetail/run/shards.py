"""How the batches of a split come to the ranks: none dropped, and none counted twice.

The batches of a run of one process, in their order, are dealt to the ranks in turn. So the
batches of all ranks in one micro-step are those that one process would take in that many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from dovetail.errors import ConfigError, DataError, build_message
from dovetail.run.distributed import Ranks
from dovetail.run.naming import Batch
from dovetail.run.tracking.recording import muted

Sharding: TypeAlias = Literal["split", "own"]


class Filler(dict[str, Tensor]):
    """A batch that has been counted, for a rank that has run out of data.

    It goes through the model with weight 0, as the other ranks wait for this one's part in their
    exchange of gradients.
    """


def deal(order: Sequence[int], batch_size: int, ranks: Ranks) -> list[int]:
    """Return the samples of a rank: every batch of `order` whose turn it has.

    A rank that would have a batch less than rank 0 gets the first one once more, as a filler.

    Args:
        order: Indices of samples.
        batch_size: Samples per batch; the last one may have fewer.
        ranks: Whose turn it is.
    """
    if ranks.size == 1:
        return list(order)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[ranks.rank :: ranks.size]
    if len(mine) < len(batches[:: ranks.size]):
        mine.append(batches[0])
    return list(itertools.chain.from_iterable(mine))


def num_own(num_batches: int, ranks: Ranks) -> int:
    """Return how many of so many batches are a rank's own."""
    return max(0, -(-(num_batches - ranks.rank) // ranks.size))


def share_out(
    batches: Iterator[Any],
    num_left: int,
    ranks: Ranks,
    sharding: Sharding | None,
    prepare: Callable[[Any], Batch] | None,
) -> Iterator[Batch]:
    """Return the batches of a rank, as many as every other rank has.

    Args:
        batches: What the rank's loader gives.
        num_left: Batches of all ranks, where the loader gives what was dealt to the rank.
        ranks: Who reads the split together.
        sharding: How they divide it; `None` where it was dealt.
        prepare: What is done to each batch.
    """
    if sharding == "split":
        batches = take_turns(batches, ranks, prepare)
    elif prepare is not None:
        batches = map(prepare, batches)
    if sharding is not None:
        return in_step(batches, ranks)
    return batches if ranks.size == 1 else mark_fillers(batches, num_own(num_left, ranks))


def mark_fillers(batches: Iterator[Batch], num_real: int) -> Iterator[Batch]:
    """Yield batches, those after the first `num_real` as fillers."""
    yield from itertools.islice(batches, num_real)
    while True:
        with muted():  # what their samples log was logged when they counted
            batch = next(batches, None)
        if batch is None:
            return
        yield Filler(batch)


def take_turns(
    batches: Iterator[Any], ranks: Ranks, prepare: Callable[[Any], Batch] | None
) -> Iterator[Batch]:
    """Yield every batch whose turn a rank has, of batches that all ranks read alike.

    Args:
        batches: Those of all ranks.
        ranks: Whose turn it is. A rank that never has one gets the first batch as a filler.
        prepare: What is done to the batches that are kept.
    """
    is_first = True
    ready = prepare or dict
    while group := list(itertools.islice(batches, ranks.size)):
        if ranks.rank < len(group):
            yield ready(group[ranks.rank])
        elif is_first:
            yield Filler(ready(group[0]))
        is_first = False


def in_step(batches: Iterator[Batch], ranks: Ranks) -> Iterator[Batch]:
    """Yield a rank's batches, and fillers until no rank has any more.

    Args:
        batches: Those of this rank, as many as there are.
        ranks: They agree before each batch.

    Raises:
        DataError: A rank has not a single one, and others have.
    """
    last: Batch | None = None
    error: Exception | None = None
    while True:
        try:
            batch = next(batches, None)
        except Exception as err:
            batch, error = None, err
        num_going_on, num_failed = ranks.add_up([float(batch is not None), float(bool(error))])
        if error is not None:
            raise error
        if num_failed:
            raise DataError(build_message("data split", "another rank failed to read its part"))
        if not num_going_on:
            return
        if last is None and num_going_on < ranks.size:
            found = f"gives {ranks.size - num_going_on:.0f} of {ranks.size} ranks no batch"
            hint = "Start fewer processes, or give each a part of the data."
            raise DataError(build_message("data split", found, "one for each", hint))
        if batch is None:
            yield Filler(last or {})
        else:
            # A copy: preprocessing on the device replaces what is in the batch.
            last = dict(batch)
            yield batch


def choose_sharding(split: Any, wanted: Sharding | None, ranks: Ranks) -> Sharding | None:
    """Return how a split is divided; `None` for a data set with a length, whose samples are dealt.

    Raises:
        ConfigError: Nobody has said how to divide a stream, or a loader of the user's own.
    """
    is_loader, is_stream = isinstance(split, DataLoader), isinstance(split, IterableDataset)
    if ranks.size == 1 or not (is_loader or is_stream):
        return None
    if wanted is not None:
        return wanted
    if is_loader and isinstance(split.sampler, DistributedSampler):
        return "own"
    what = "loader of your own" if is_loader else "stream"
    found = f"nothing given, and {ranks.size} processes read a {what} ({type(split).__name__})"
    hint = (
        'Write "split" if each reads all of it and keeps its turn, or "own" if the data factory '
        "gives each process a part; or return a data set with a length."
    )
    raise ConfigError(build_message("config distributed.data", found, '"split" or "own"', hint))


def check_lengths(lengths: Sequence[int | None], name: str) -> None:
    """Check that the ranks have the same data set.

    Args:
        lengths: Its length on each rank.
        name: The split, for messages.

    Raises:
        DataError: The lengths differ.
    """
    for rank, length in enumerate(lengths):
        if length != lengths[0]:
            found = f"has {length} samples on rank {rank} and {lengths[0]} on rank 0"
            hint = "A data factory that draws at random must draw the same on every rank."
            where = f"data split {name!r}"
            raise DataError(build_message(where, found, "the same data set", hint))
