"""How samples and batches are compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import build_message
from dovetail.testing.suite import expect

_RTOL, _ATOL = 1e-5, 1e-6  # kernels round differently for other batch sizes


def check_batch(batch: object, where: str) -> None:
    """Check that a collator's answer is a dict of named tensors.

    Raises:
        ConformanceError: It is not.
    """
    expected = "a dict of names to tensors"
    found = f"the batch is a {type(batch).__name__}"
    if not isinstance(batch, dict):
        raise_unless(False, where, found, expected)
        return
    raise_unless(bool(batch), where, "the batch is empty", expected)
    for key, value in batch.items():
        found = f"batch key {key!r} is a {type(key).__name__}"
        raise_unless(isinstance(key, str), where, found, "a str")
        found = f"batch[{key!r}] is a {type(value).__name__}"
        raise_unless(isinstance(value, Tensor), where, found, "a tensor")


def raise_unless(condition: bool, where: str, found: str, expected: str, hint: str = "") -> None:
    """Raise a `ConformanceError` in the words of every message, unless `condition` holds."""
    expect(condition, "" if condition else build_message(where, found, expected, hint))


def find_difference(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> str | None:
    """Return how two batches differ, to the bit; `None` where they do not.

    Args:
        first: A batch.
        second: Another.
        ignored: Keys of which only dtype and shape are compared.
    """
    if list(first) != list(second):
        return f"keys {list(first)} and {list(second)}"
    for key, left in first.items():
        right = second[key]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            forms = f"{left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
            return f"{key!r}: {forms}"
        if key not in ignored and not is_equal(left, right):
            return f"the values of {key!r}"
    return None


def is_equal(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, NaN to NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    same: Tensor = left == right
    if left.is_floating_point() or left.is_complex():
        same = same | (left.isnan() & right.isnan())
    return bool(same.all())


def is_close(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one shape hold the same numbers, whatever their dtypes."""
    if left.shape != right.shape:
        return False
    if left.is_complex() or right.is_complex():
        return torch.allclose(left, right, _RTOL, _ATOL, equal_nan=True)
    return torch.allclose(left.double(), right.double(), _RTOL, _ATOL, equal_nan=True)


def is_same_row(row: Tensor, alone: Tensor) -> bool:
    """Return whether a row of a batch agrees with the row that its sample makes alone.

    Rows of padded sequences have the width of their batch. They agree where the narrower one lies
    in the wider one: at its beginning, at its end or in its middle.

    Args:
        row: A row of the batch, `(...)`.
        alone: The row of its sample, collated alone; of the same rank.
    """
    if row.ndim != alone.ndim:
        return False
    places = [_places(wide, narrow) for wide, narrow in zip(row.shape, alone.shape, strict=True)]
    return any(
        is_close(_cut(row, [p[0] for p in place]), _cut(alone, [p[1] for p in place]))
        for place in itertools.product(*places)
    )


def _places(first: int, second: int) -> list[tuple[slice, slice]]:
    """Return where the common part of two sizes may lie in each of them."""
    size, spare = min(first, second), abs(first - second)
    starts = sorted({0, spare, spare // 2, spare - spare // 2})
    whole = slice(0, size)
    parts = [slice(start, start + size) for start in starts]
    return [(part, whole) if first >= second else (whole, part) for part in parts]


def _cut(tensor: Tensor, place: Sequence[slice]) -> Tensor:
    return tensor[tuple(place)] if place else tensor


def is_same_value(left: Any, right: Any) -> bool:
    """Return whether two values of samples are equal: arrays, images, nested lists, anything."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return is_equal(left.detach(), right.detach())
    if isinstance(left, np.ndarray | np.generic):
        same_form = left.dtype == right.dtype and left.shape == right.shape
        return bool(same_form and left.tobytes() == right.tobytes())
    if isinstance(left, Mapping):
        pairs = [(left[key], right[key]) for key in left if key in right]
        return list(left) == list(right) and all(is_same_value(*pair) for pair in pairs)
    if isinstance(left, list | tuple):
        pairs = list(zip(left, right, strict=False))
        return len(left) == len(right) and all(is_same_value(*pair) for pair in pairs)
    if callable(getattr(left, "tobytes", None)):  # an image
        return bool(left.tobytes() == right.tobytes())
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    # Without an equality of its own, a copy is never equal: there is nothing to compare.
    has_equality = "__eq__" in {name for cls in type(left).__mro__[:-1] for name in vars(cls)}
    return not has_equality or bool(left == right)


def has_float64(value: Any) -> bool:
    """Return whether a sample's value holds an array, a tensor or a NumPy number of float64."""
    if isinstance(value, Tensor):
        return value.dtype == torch.float64
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype == np.float64
    if isinstance(value, list | tuple):
        return any(map(has_float64, value))
    return False


def number_kind(value: Any) -> Literal["whole", "fraction"] | None:
    """Return what numbers a sample's value is made of; `None` where it is not numbers."""
    if isinstance(value, Tensor):
        return "fraction" if value.is_floating_point() else "whole"
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "iub":
            return "whole"
        return "fraction" if value.dtype.kind == "f" else None
    if isinstance(value, float):
        return "fraction"
    if isinstance(value, int):
        return "whole"
    if isinstance(value, list | tuple):
        kinds = {number_kind(item) for item in value}
        if None in kinds or not kinds:
            return None
        return "fraction" if "fraction" in kinds else "whole"
    return None
