from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from dovetail.run.feed import BatchFeed
from dovetail.run.loader import EpochLoader, EpochSampler
from dovetail.run.tracking.recording import log_metric, rehearsal
from dovetail.run.tracking.windows import WindowMetrics


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """A stream of five samples that logs the number of each as it is read, and that it ended."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for n in range(5):
            log_metric("number", n, reduce="sum")
            yield {"x": torch.tensor(n)}
        log_metric("end", 1)


class Numbers:
    """Five samples that log their number as they are read."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        log_metric("number", index, reduce="sum")
        return {"x": torch.tensor(index)}


def loader_of(data: Any, *, is_own: bool = False) -> EpochLoader:
    if isinstance(data, IterableDataset):
        return EpochLoader(DataLoader(data, 1, generator=torch.Generator()), None, 1, None, 0)
    if is_own:
        return EpochLoader(DataLoader(data, 1, generator=torch.Generator()), None, None, None, 0)
    sampler = EpochSampler(len(data), 0, False)
    return EpochLoader(DataLoader(data, 1, sampler=sampler), sampler, 1, None, 0)


def read(feed: BatchFeed, windows: WindowMetrics, start: int = 0) -> list[Any]:
    """Return number, whether it is the last, and what was logged for it, of each batch."""
    found = []
    for batch, is_last in feed.epoch(0, start):
        windows.fold(1)
        logged = windows.close()
        found.append((int(batch["x"]), is_last, logged))
    return found


@pytest.fixture
def windows() -> Iterator[WindowMetrics]:
    with rehearsal() as made:
        yield made


def expected_from(start: int, data: Any) -> list[Any]:
    found = [(n, n == 4, {"val/number": float(n)}) for n in range(start, 5)]
    if isinstance(data, Stream):
        found[-1][2]["val/end"] = 1.0
    return found


@pytest.mark.parametrize("data", [Numbers(), Stream()])
def test_each_batch_comes_with_what_its_reading_logged(windows: WindowMetrics, data: Any) -> None:
    assert read(BatchFeed(loader_of(data), windows), windows) == expected_from(0, data)


@pytest.mark.parametrize("data", [Numbers(), Stream()])
@pytest.mark.parametrize("is_own", [False, True])
def test_batches_that_a_resumed_run_leaves_out_log_nothing(
    windows: WindowMetrics, data: Any, is_own: bool
) -> None:
    feed = BatchFeed(loader_of(data, is_own=is_own), windows)
    assert read(feed, windows, start=3) == expected_from(3, data)


@pytest.mark.parametrize(("data", "num_reads"), [(Numbers(), 6), (Stream(), 6)])
def test_the_time_spent_waiting_is_that_of_reading_alone(
    windows: WindowMetrics, monkeypatch: pytest.MonkeyPatch, data: Any, num_reads: int
) -> None:
    # Each look at the clock comes a second after the one before.
    seconds = iter(range(1000))
    monkeypatch.setattr("dovetail.run.feed.perf_counter", lambda: float(next(seconds)))
    feed = BatchFeed(loader_of(data), windows)
    assert feed.take_wait_s() == 0
    for _ in feed.epoch(0, 0):
        next(seconds)  # training takes a second, and is not waited for
    assert feed.take_wait_s() == num_reads
    assert feed.take_wait_s() == 0


def test_an_empty_stream_ends_at_once(windows: WindowMetrics) -> None:
    class Empty(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    assert list(BatchFeed(loader_of(Empty()), windows).epoch(0, 0)) == []
