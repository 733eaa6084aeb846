"""How near an artifact's outputs come to the trained model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from dovetail.bundle.golden import Arrays
    from dovetail.types import Array

Precision: TypeAlias = Literal["float64", "float32", "float16", "bfloat16"]
"""The coarsest floating-point type a model computes in."""

LIMITS: Final[dict[Precision, float]] = {
    "float64": 1e-5,
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}
"""Largest error, relative to the largest output, at which two runtimes agree.

About 80 roundings of float32, 10 of float16 and 6 of bfloat16: runtimes add in another order.
"""


class ParityError(Exception):
    """Outputs that no limit makes equal: names, dtypes, shapes, NaN or infinity differ."""


def measure_error(expected: Arrays, actual: Arrays) -> float:
    """Return the largest error over all outputs, each relative to its largest expected value.

    Args:
        expected: The trained model's outputs.
        actual: The artifact's outputs.

    Raises:
        ParityError: The outputs are not of the same kind.
    """
    if set(expected) != set(actual):
        raise ParityError(f"outputs are named {sorted(actual)} instead of {sorted(expected)}")
    return max(_measure_one(name, expected[name], actual[name]) for name in expected)


def _measure_one(name: str, expected: Array, actual: Array) -> float:
    if actual.dtype != expected.dtype:
        raise ParityError(f"output {name!r} is {actual.dtype} instead of {expected.dtype}")
    if actual.shape != expected.shape:
        raise ParityError(f"output {name!r} has shape {actual.shape} instead of {expected.shape}")
    if not np.issubdtype(expected.dtype, np.inexact):
        differing = int((expected != actual).sum())
        if differing:
            raise ParityError(f"output {name!r}: {differing} of {expected.size} values differ")
        return 0.0
    wanted, found = expected.astype(np.float64), actual.astype(np.float64)
    is_finite = np.isfinite(wanted)
    if not np.array_equal(wanted[~is_finite], found[~is_finite]):  # NaN equals nothing
        raise ParityError(f"output {name!r}: NaN or infinities differ")
    if not bool(np.isfinite(found[is_finite]).all()):
        count = int((~np.isfinite(found[is_finite])).sum())
        raise ParityError(f"output {name!r}: {count} values are NaN or infinite")
    if not is_finite.any():
        return 0.0
    largest = float(np.abs(wanted[is_finite]).max()) or 1.0
    return float(np.abs(wanted[is_finite] - found[is_finite]).max()) / largest
