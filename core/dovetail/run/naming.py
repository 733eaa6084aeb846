"""Names for samples that are tuples, and a look at the first batch that a collator makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from dovetail.errors import BrokenPluginError, DataError, build_message
from dovetail.signature import LABELS
from dovetail.types import Collator

Batch: TypeAlias = dict[str, Tensor]


class NamingCollator:
    """Gives tuple samples, as torchvision's data sets return them, the names of a task.

    Args:
        collator: What makes batches of mappings.
        name: Name of the input; the second item of a tuple is its labels.
        where: Whose collator it is, for messages.
    """

    def __init__(self, collator: Collator, name: str, where: str = "the collator") -> None:
        self._collator = collator
        self._name = name
        self._where = where
        self._is_checked = False

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """Collate mappings or tuples.

        Raises:
            BrokenPluginError: The first batch is no dict of tensors.
        """
        if samples and not isinstance(samples[0], Mapping):
            samples = [name_tuple(sample, self._name) for sample in samples]
        batch = self._collator(samples)
        if not self._is_checked:
            _check_batch(batch, self._where)
            self._is_checked = True
        return batch


def _check_batch(batch: Any, where: str) -> None:
    """Refuse what a collator must not return, whatever its annotation says."""
    expected = "a dict of tensors by name"
    if not isinstance(batch, dict):
        found = f"its collator returned a {type(batch).__name__}"
        raise BrokenPluginError(build_message(where, found, expected))
    for key, value in batch.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"its collator returned a {type(value).__name__} under {key!r}"
            raise BrokenPluginError(build_message(where, found, expected))


def name_tuple(sample: Any, name: str) -> Mapping[str, Any]:
    """Return a sample, or a batch, as a mapping; the second item of a tuple is its labels.

    Raises:
        DataError: It is neither a mapping nor a tuple of one or two items.
    """
    if isinstance(sample, Mapping):
        return sample
    if isinstance(sample, tuple | list) and len(sample) in (1, 2):
        return dict(zip((name, LABELS), sample, strict=False))
    found = f"is a {type(sample).__name__}"
    if isinstance(sample, tuple | list):
        found += f" of {len(sample)} items"
    expected = f"a mapping, or a tuple ({name}, {LABELS})"
    raise DataError(build_message("sample", found, expected))
