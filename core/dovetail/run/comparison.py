"""Metrics of several runs side by side, and which of them is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.run.overview import RunSummary

_SMALLER = ("loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer")
_LARGER = ("accuracy", "precision", "recall", "f1", "auc", "auroc", "r2", "score", "bleu", "iou")


@dataclass(frozen=True)
class MetricRow:
    """One metric of several runs."""

    name: str
    values: tuple[float | None, ...]
    """One per run; `None` where a run has no such metric."""
    better: int | None = None
    """Number of the run with the better value; `None` where nobody knows, or two are equal."""


def better_mode(name: str, monitors: Mapping[str, str]) -> str | None:
    """Return "min" or "max" for a metric of which it is known, else `None`.

    Args:
        name: The metric.
        monitors: Mode by metric, as the runs' settings say.
    """
    if name in monitors:
        return monitors[name]
    words = set(name.rpartition("/")[2].lower().replace("-", "_").split("_"))
    if words & set(_SMALLER):
        return "min"
    return "max" if words & set(_LARGER) else None


def compare_metrics(
    runs: Sequence[RunSummary], all_metrics: Sequence[Mapping[str, float]]
) -> list[MetricRow]:
    """Put the metrics of runs side by side.

    Args:
        runs: The runs; what they monitor says what is better.
        all_metrics: Metrics of each of them.
    """
    monitors: dict[str, str] = {}
    for run in runs:
        mode = monitors.setdefault(run.monitor, run.monitor_mode)
        if mode != run.monitor_mode:  # the runs themselves do not agree
            monitors[run.monitor] = ""
    names = dict.fromkeys(name for metrics in all_metrics for name in metrics)
    rows = []
    for name in names:
        values = tuple(metrics.get(name) for metrics in all_metrics)
        rows.append(MetricRow(name, values, find_better(values, better_mode(name, monitors))))
    return rows


def find_better(values: Sequence[float | None], mode: str | None) -> int | None:
    """Return the number of the single best value, if there is one."""
    finite = [(v, n) for n, v in enumerate(values) if v is not None and math.isfinite(v)]
    if not mode or len(values) < 2 or not finite:
        return None
    best, number = (min if mode == "min" else max)(finite, key=lambda pair: pair[0])
    return number if sum(value == best for value, _ in finite) == 1 else None
