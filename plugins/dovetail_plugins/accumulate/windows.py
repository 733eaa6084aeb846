"""Windows known before they begin: read ahead, agreed by all ranks, of one length on each.

A loop that has every micro-batch of a window before it runs the first knows where the window ends
and how many items it has. The ranks tell each other once per window, in one small message of host
numbers: nothing waits for a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate as running_sums
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from dovetail.errors import ConfigError, DataError, build_message

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class MicroBatch(Generic[Batch]):
    """One micro-batch of a window that is known as a whole."""

    batch: Batch
    """What the loader gave. Of a rank that has no more: its last one once again."""
    items: float
    """Items of this micro-batch on this rank; 0 for a repeated one."""
    is_final: bool
    """Whether it ends its window."""
    is_last: bool
    """Whether it ends the data of all ranks."""
    window_items: float
    """Items of the window, of all ranks."""
    window_length: int
    """Micro-batches of the window, on every rank."""
    num_ranks: int
    """Ranks that take part."""


def plan_windows(
    batches: Iterable[Batch],
    steps: int | Callable[[int], int],
    count_items: Callable[[Batch], float],
    *,
    items_per_step: float | None = None,
    process_group: Any = None,
) -> Iterator[MicroBatch[Batch]]:
    """Yield the batches with what is known of their windows.

    A rank that runs out of data repeats its last batch with 0 items until all are through, so that
    forward and backward run, and their collectives match. With several ranks, all must iterate.

    Args:
        batches: The batches of this rank, on any device.
        steps: Micro-batches of a full window, or what tells it from the number of windows given
            before. With `items_per_step` it is not used.
        count_items: Items that the mean loss of a batch runs over: samples, or target tokens that
            are not ignored. It should look at nothing that is on a device.
        items_per_step: End a window with the micro-batch in which its items, those of all ranks
            together, reach this number.
        process_group: The ranks that average their gradients; all, unless given.

    Raises:
        ConfigError: `steps` or `items_per_step` is below 1.
        DataError: A rank has no batch at all, and nothing to repeat therefore.
    """
    ranks = _Ranks(process_group)
    source = _Source(batches, count_items)
    num_windows = 0
    while True:
        if items_per_step is None:
            length = _check(steps if isinstance(steps, int) else steps(num_windows), "steps")
        else:
            share = _check(items_per_step, "items_per_step") / ranks.count
            length = int(ranks.join([source.look_for(share)], dist.ReduceOp.MAX)[0])
        items, takers = _look(source, ranks, length)
        while items_per_step is not None and sum(items) < items_per_step and takers[length]:
            # Ranks that have run out left their share to the others.
            length *= 2
            items, takers = _look(source, ranks, length)
        length = _length(items, takers, items_per_step)
        if not length:
            return
        if num_windows == 0 and takers[0] < ranks.count:
            raise DataError(
                build_message(
                    "plan_windows",
                    f"{ranks.count - int(takers[0])} of {ranks.count} ranks have no batch at all",
                    "one on each rank at least",
                    "Give every rank data, or use fewer ranks.",
                )
            )
        total, has_more = sum(items[:length]), takers[length] > 0
        for index in range(length):
            batch, size = source.take()
            is_final = index + 1 == length
            is_last = is_final and not has_more
            yield MicroBatch(batch, size, is_final, is_last, total, length, ranks.count)
        num_windows += 1


def _look(source: _Source[Batch], ranks: _Ranks, length: int) -> tuple[list[float], list[float]]:
    """Return the items of the next `length` micro-batches over all ranks, and who has how many.

    The second is the number of ranks that have a batch, for one micro-batch more: whether others
    follow.
    """
    counts = source.look_at(length + 1)
    missing = [0.0] * (length + 1 - len(counts))
    present = [1.0] * len(counts)
    joined = ranks.join([*counts, *missing, *present, *missing], dist.ReduceOp.SUM)
    return joined[:length], joined[length + 1 :]


def _length(items: list[float], takers: list[float], items_per_step: float | None) -> int:
    available = sum(taker > 0 for taker in takers[: len(items)])
    if items_per_step is None:
        return available
    reached = (i + 1 for i, total in enumerate(running_sums(items)) if total >= items_per_step)
    return min(next(reached, available), available)


def _check(value: Any, name: str) -> Any:
    if not value >= 1:
        raise ConfigError(build_message("plan_windows", f"{name} must be >= 1, got {value!r}"))
    return value


class _Source(Generic[Batch]):
    """The batches of this rank, read as far ahead as somebody looks."""

    def __init__(self, batches: Iterable[Batch], count_items: Callable[[Batch], float]) -> None:
        self._batches = iter(batches)
        self._count_items = count_items
        self._waiting: deque[tuple[Batch, float]] = deque()
        self._last: tuple[Batch, float] | None = None

    def look_at(self, number: int) -> list[float]:
        """Return the items of the next `number` batches, or of those that there are."""
        while len(self._waiting) < number and self._read():
            pass
        return [size for _, size in list(self._waiting)[:number]]

    def look_for(self, items: float) -> int:
        """Return how many batches it takes to have `items`, or how many there are."""
        total, number = 0.0, 0
        while total < items and (number < len(self._waiting) or self._read()):
            total += self._waiting[number][1]
            number += 1
        return number

    def take(self) -> tuple[Batch, float]:
        if self._waiting:
            self._last = self._waiting.popleft()
            return self._last
        assert self._last is not None  # every rank had a batch in the first window
        return self._last[0], 0.0

    def _read(self) -> bool:
        try:
            batch = next(self._batches)
        except StopIteration:
            return False
        self._waiting.append((batch, float(self._count_items(batch))))
        return True


class _Ranks:
    """Joins numbers of the host over the ranks, without a device."""

    def __init__(self, group: Any) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if is_distributed else 1
        if self.count > 1 and "gloo" not in str(dist.get_backend(group)):
            # The default group may know devices only, and would make the host wait for one.
            ranks = None if group is None else dist.get_process_group_ranks(group)
            group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._group = group

    def join(self, numbers: list[float], operation: Any) -> list[float]:
        if self.count == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation, self._group)
        joined: list[float] = tensor.tolist()
        return joined
