from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dovetail_plugins.collate import buffers
from dovetail_plugins.collate.buffers import BufferPool, new_tensor
from dovetail_plugins.collate.vision import VisionDataCollator

SHAPE = (8, 3, 4, 4)


@pytest.fixture
def pool():
    pool = BufferPool()
    pool.take(SHAPE, torch.float32)
    if pool.take(SHAPE, torch.float32).data_ptr() != pool.take(SHAPE, torch.float32).data_ptr():
        pytest.skip("this torch does not tell who holds a storage")
    return pool


def saved_for_backward(tensor):
    weight = torch.ones(SHAPE, requires_grad=True)
    return (weight * tensor).sum()


HOLDERS = {
    "itself": lambda t: t,
    "view": lambda t: t[1:],
    "dtype view": lambda t: t.view(torch.int32),
    "detached": lambda t: t.detach(),
    "array": lambda t: t.numpy(),
    "slice of array": lambda t: t.numpy()[2:],
    "memoryview": lambda t: memoryview(t.numpy()),
    "storage": lambda t: t.untyped_storage(),
    "dlpack": torch.utils.dlpack.to_dlpack,
    "graph": saved_for_backward,
}


def test_pool_uses_memory_again_when_nobody_holds_it(pool):
    first = pool.take(SHAPE, torch.float32)
    address = first.data_ptr()
    del first

    assert pool.take(SHAPE, torch.float32).data_ptr() == address


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_pool_leaves_memory_alone_when_somebody_holds_it(pool, hold):
    tensor = pool.take(SHAPE, torch.float32)
    address = tensor.data_ptr()
    holder = hold(tensor)
    del tensor

    assert all(pool.take(SHAPE, torch.float32).data_ptr() != address for _ in range(4))
    del holder


def test_pool_leaves_memory_alone_when_it_is_shared(pool):
    tensor = pool.take(SHAPE, torch.float32)
    tensor.share_memory_()
    address = tensor.data_ptr()
    del tensor

    assert all(pool.take(SHAPE, torch.float32).data_ptr() != address for _ in range(4))


@pytest.mark.parametrize("num_bytes", [0, 4096])
def test_pool_drops_memory_when_its_size_was_changed(pool, num_bytes):
    tensor = pool.take(SHAPE, torch.float32)
    tensor.untyped_storage().resize_(num_bytes)
    del tensor

    for _ in range(4):
        pool.take(SHAPE, torch.float32).fill_(1.0)


def test_pool_gives_fresh_memory_when_shape_or_dtype_differ(pool):
    assert pool.take((2, 3), torch.float32).shape == (2, 3)
    assert pool.take(SHAPE, torch.float16).dtype == torch.float16


def test_pool_gives_normal_tensors_when_in_inference_mode(pool):
    with torch.inference_mode():
        pool.take((2, 2), torch.float32)
    assert not pool.take((2, 2), torch.float32).is_inference()


def test_pool_gives_fresh_memory_when_torch_cannot_count(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    buffers._counts_holders.cache_clear()
    try:
        pool = BufferPool()
        assert pool.take((2, 2), torch.float32).shape == (2, 2)
        assert not pool._slots
    finally:
        buffers._counts_holders.cache_clear()


def test_pool_travels_without_its_memory(pool):
    again = pickle.loads(pickle.dumps(pool))

    assert not again._slots
    assert again.take((2,), torch.float32).shape == (2,)


def test_new_tensor_is_private_outside_of_workers():
    assert not new_tensor((2, 3), torch.float32).is_shared()
    assert new_tensor((0, 3), torch.int64).shape == (0, 3)


def test_batches_stay_as_they_were_when_a_list_keeps_them():
    rng = np.random.default_rng(0)
    batches = [
        [{"pixel_values": rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)} for _ in range(4)]
        for _ in range(8)
    ]
    collate = VisionDataCollator()

    kept = [collate(batch)["pixel_values"] for batch in batches]

    for batch, pixels in zip(batches, kept, strict=True):
        assert torch.equal(pixels, VisionDataCollator()(batch)["pixel_values"])


class Recorder:
    """Collates and notes whether the batch was written into shared memory."""

    def __init__(self):
        self.collate = VisionDataCollator()

    def __call__(self, samples):
        batch = self.collate(samples)
        return {**batch, "was_shared": torch.tensor(batch["pixel_values"].is_shared())}


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    return [
        {"pixel_values": rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), "labels": i}
        for i in range(12)
    ]


# Python warns of forking beside torch's threads; these workers touch none of them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a spawned worker cannot import us")
def test_worker_writes_batches_into_shared_memory(dataset):
    loader = DataLoader(
        dataset, 4, num_workers=1, collate_fn=Recorder(), multiprocessing_context="fork"
    )

    batches = list(loader)

    assert all(batch["was_shared"] for batch in batches)
    assert not Recorder()(dataset)["was_shared"]


@pytest.mark.slow
def test_spawned_worker_gives_the_same_batches(dataset):
    loaders = [
        DataLoader(dataset, 4, collate_fn=VisionDataCollator(), **workers)
        for workers in ({}, {"num_workers": 1, "multiprocessing_context": "spawn"})
    ]

    here, there = (list(loader) for loader in loaders)

    for expected, batch in zip(here, there, strict=True):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["labels"], expected["labels"])
