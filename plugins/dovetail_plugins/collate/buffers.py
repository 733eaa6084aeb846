"""Memory for batches: shared in a loader's worker, used again where nobody holds it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

if TYPE_CHECKING:
    from collections.abc import Sequence

_SLOTS = 2  # one batch in the caller's hands, one being written


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor; in a loader's worker it lies in shared memory.

    A batch that is written where the loader's process reads it is not copied once more on its
    way there.

    Source:
        `torch.utils.data._utils.collate.collate_tensor_fn`, which does the same.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    new_shared: Any = getattr(torch.UntypedStorage, "_new_shared", None)
    if get_worker_info() is None or new_shared is None or not num_bytes:
        return torch.empty(*shape, dtype=dtype)
    storage: torch.UntypedStorage = new_shared(num_bytes)
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


class BufferPool:
    """Hands out large tensors and takes the memory back once nothing refers to it.

    It does what an allocator does with freed memory, without returning the pages to the system in
    between. The holders of a storage are counted: views, detached tensors, NumPy arrays, graphs
    that saved it. Memory that another process may map is never used again, so there is no reuse
    in a loader's worker. Where torch cannot count holders every tensor is fresh.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor that nobody else refers to."""
        if get_worker_info() is not None or not _counts_holders():
            return new_tensor(shape, dtype)
        slot = self._free_slot(tuple(shape), dtype) or _Slot.new(shape, dtype)
        # An alias leaves the slot's own tensor, and so the baseline of its holders, untouched.
        tensor = slot.tensor.detach()
        self._slots.append(slot)
        del self._slots[:-_SLOTS]
        return tensor

    def _free_slot(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Slot | None:
        # Popping is atomic: of two threads that share a collator only one gets a slot.
        for _ in range(len(self._slots)):
            try:
                slot = self._slots.pop(0)
            except IndexError:
                return None
            if slot.tensor.shape == shape and slot.tensor.dtype == dtype and slot.is_free():
                return slot
            self._slots.append(slot)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slots = []


@dataclass
class _Slot:
    tensor: Tensor
    storage: torch.UntypedStorage
    num_bytes: int
    idle: tuple[int, int] = (0, 0)

    @classmethod
    def new(cls, shape: Sequence[int], dtype: torch.dtype) -> _Slot:
        # A tensor made in inference mode could not be saved for a later backward.
        with torch.inference_mode(False):
            tensor = torch.empty(*shape, dtype=dtype)
        slot = cls(tensor, tensor.untyped_storage(), math.prod(shape) * dtype.itemsize)
        slot.idle = slot.holders()
        return slot

    def holders(self) -> tuple[int, int]:
        # The first number counts tensors, the second the Python objects of the storage itself.
        # Private, and in the stubs of some releases only; `_counts_holders` has tried it.
        count = torch._C._storage_Use_Count(self.storage._cdata)  # type: ignore[attr-defined, unused-ignore]
        return count, sys.getrefcount(self.storage)

    def is_free(self) -> bool:
        is_ours = not self.storage.is_shared() and self.storage.nbytes() == self.num_bytes
        return is_ours and self.holders() == self.idle


@cache
def _counts_holders() -> bool:
    # The count is private to torch: try what it must see instead of trusting the name.
    try:
        slot = _Slot.new((4,), torch.float32)
        alias = slot.tensor.detach()
        seen = [not slot.is_free()]
        array = alias.numpy()
        del alias
        seen.append(not slot.is_free())
        del array
        seen.append(slot.is_free())
        storage = slot.tensor.detach().untyped_storage()
        seen.append(not slot.is_free())
        del storage
        seen.append(slot.is_free())
    except (AttributeError, TypeError, RuntimeError):
        return False
    return all(seen)
