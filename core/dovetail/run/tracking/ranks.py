"""User metrics of several ranks: reduced together when their window closes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from dovetail.run.tracking.windows import Series


def is_rank_zero() -> bool:
    """Whether this process writes: the only one, or rank 0 of several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def reduce_over_ranks(shared: Sequence[Series]) -> dict[str, float]:
    """Return the metrics over all ranks, with one reduction of sums and one of maxima.

    A rank that logged nothing in this window takes part all the same, without a say.

    Args:
        shared: The settled series, the same names in the same order on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {series.name: series.result() for series in shared if series.count}
    # NaN is counted, as reductions differ in whether a maximum keeps it.
    sums = _all_reduce([x for series in shared for x in _addends(series)], dist.ReduceOp.SUM)
    has_bounds = any(series.reduction in ("max", "min") for series in shared)
    bounds = [0.0] * len(shared)
    if has_bounds:
        bounds = _all_reduce([_bound(series) for series in shared], dist.ReduceOp.MAX)
    found: dict[str, float] = {}
    for n, series in enumerate(shared):
        total, weight, count = sums[3 * n : 3 * n + 3]
        if not count:
            continue
        if series.reduction == "sum":
            found[series.name] = total
        elif series.reduction == "mean":
            # Without an item on any rank there are no weights to go by.
            found[series.name] = total / weight if weight else _plain_mean(series)
        else:
            sign = 1.0 if series.reduction == "max" else -1.0
            found[series.name] = math.nan if total else sign * bounds[n]
    return found


def _addends(series: Series) -> tuple[float, float, float]:
    is_bound = series.reduction in ("max", "min")
    total = float(bool(series.count) and math.isnan(series.bound)) if is_bound else series.total
    return total, series.weight, float(series.count)


def _bound(series: Series) -> float:
    if not series.count or math.isnan(series.bound):
        return -math.inf
    return -series.bound if series.reduction == "min" else series.bound


def _plain_mean(series: Series) -> float:
    return series.plain / series.count if series.count else math.nan


def _all_reduce(values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    # A group for CPU and GPU together is called "cpu:gloo,cuda:nccl".
    has_cpu = any(name in dist.get_backend() for name in ("gloo", "mpi"))
    device = "cpu" if has_cpu else torch.accelerator.current_accelerator()
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    found: list[float] = tensor.tolist()
    return found
