"""Makes long curves short without losing a peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BINS = 300
"""Columns of a curve: about as many as a panel is wide in pixels."""


@dataclass(frozen=True)
class Thinned:
    """A curve in columns; a short one keeps its points."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    """Mean of each column's finite values, NaN where it has none."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    non_finite_x: NDArray[np.float64]
    """Columns with a value that is not finite."""
    num_per_bin: int = 1
    """Points of the fullest column; 1 where nothing was thinned."""


def thin(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    max_bins: int = MAX_BINS,
) -> Thinned:
    """Gather a curve in columns of equal width, each with its mean and its extremes.

    Args:
        x: Places, `(points,)`.
        y: Values, `(points,)`; NaN and infinities are gaps.
        weights: Weight of each value in its column's mean.
        max_bins: Columns; a curve of at most twice as many points stays as it is.
    """
    import numpy as np

    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    is_finite = np.isfinite(y)
    if len(x) <= 2 * max_bins or x[0] == x[-1]:
        y = np.where(is_finite, y, np.nan)
        return Thinned(x, y, y, y, x[~is_finite])
    weight = np.ones_like(y) if weights is None else weights[order]
    # Divided first, so that places far from zero lose no column.
    columns = np.minimum(((x - x[0]) / (x[-1] - x[0]) * max_bins).astype(int), max_bins - 1)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    weight = np.where(is_finite, weight, 0.0)
    total = np.add.reduceat(weight, starts)
    count = np.add.reduceat(is_finite.astype(int), starts)
    size = np.diff(starts, append=len(x))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(is_finite, y, 0.0) * weight, starts) / total
    low = np.minimum.reduceat(np.where(is_finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(is_finite, y, -np.inf), starts)
    middle = np.add.reduceat(x, starts) / size
    empty = count == 0
    mean, low, high = (np.where(empty, np.nan, part) for part in (mean, low, high))
    return Thinned(middle, mean, low, high, middle[count < size], int(size.max()))
