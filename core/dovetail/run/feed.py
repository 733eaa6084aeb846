"""What the loop is fed with: the batches of an epoch, and how long it waited for them."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from dovetail.run.loader import EpochLoader
from dovetail.run.naming import Batch
from dovetail.run.tracking.recording import muted
from dovetail.run.tracking.windows import Pending, WindowMetrics


class BatchFeed:
    """Batches of a split, each with whether it is the last of its epoch.

    Args:
        loader: The split.
        windows: Where metrics go that the code of the data logs while a batch is read.
    """

    def __init__(self, loader: EpochLoader, windows: WindowMetrics) -> None:
        self._wait_s = 0.0
        self._loader = loader
        self._windows = windows

    def take_wait_s(self) -> float:
        """Return the seconds spent waiting for batches since this was asked before."""
        waited_s, self._wait_s = self._wait_s, 0.0
        return waited_s

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, bool]]:
        """Yield the batches of an epoch from `start` on, each with whether it is the last."""
        # What a resumed run leaves out was logged before.
        with muted():
            batches = self._loader.iterate(epoch, start)
        if self._loader.is_length_exact:
            return self._count(batches, start)
        return self._look_ahead(batches)

    def _count(self, batches: Iterator[Batch], start: int) -> Iterator[tuple[Batch, bool]]:
        # Nothing is read ahead where the end is known: what a batch draws at random comes after
        # the checkpoint before it.
        total, number = self._loader.num_left(start), 0
        while True:
            began = perf_counter()
            batch = next(batches, None)
            self._wait_s += perf_counter() - began
            if batch is None:
                return
            number += 1
            yield batch, number == total

    def _look_ahead(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
        batch, logged = self._read(batches)
        while batch is not None:
            # What the following batch logs while it is read stays with it.
            following, logged_next = self._read(batches)
            is_last = following is None
            self._windows.give(logged + logged_next if is_last else logged)
            yield batch, is_last
            batch, logged = following, logged_next

    def _read(self, batches: Iterator[Batch]) -> tuple[Batch | None, Pending]:
        began = perf_counter()
        batch = next(batches, None)
        self._wait_s += perf_counter() - began
        return batch, self._windows.take()
