"""The epochs of a training loop of one's own: their metrics, and the best of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from dovetail.errors import ConfigError, build_message, did_you_mean
from dovetail.run.tracking.values import as_number, check_name, to_floats

_WHERE = "MetricsTracker"


class EpochTable:
    """Metrics of epochs, one row each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        """`epoch` and the metrics of each."""

    def add(
        self,
        epoch: int,
        train_metrics: Mapping[str, Any],
        val_metrics: Mapping[str, Any],
        others: Mapping[str, Any],
    ) -> dict[str, float]:
        """Add an epoch and return its metrics by full name, with the perplexities.

        Raises:
            ConfigError: The epoch is no integer, a name is empty, or a value is no number.
        """
        try:
            number = operator.index(epoch)
        except TypeError as err:
            found = f"epoch is {epoch!r}"
            raise ConfigError(build_message(f"{_WHERE}.log_epoch", found, "an integer")) from err
        metrics = _prefixed("train/", train_metrics) | _prefixed("val/", val_metrics)
        metrics |= _as_floats({k: v for k, v in others.items() if v is not None})
        self.rows.append({"epoch": number, **metrics})
        return metrics

    def best(self, metric: str, mode: str) -> int:
        """Return the epoch with the smallest or largest value of a metric.

        Raises:
            ConfigError: No epoch has a value of it, or the mode is neither "min" nor "max".
        """
        where = f"{_WHERE}.get_best_epoch"
        if mode not in ("min", "max"):
            raise ConfigError(build_message(where, f"mode is {mode!r}", "'min' or 'max'"))
        found = [
            (row["epoch"], row[metric])
            for row in self.rows
            if metric in row and not math.isnan(row[metric])
        ]
        if not found:
            names = dict.fromkeys(name for row in self.rows for name in row if name != "epoch")
            expected = f"one of {', '.join(names)}" if names else "log_epoch to be called first"
            text = f"no epoch has a value of {metric!r}"
            raise ConfigError(build_message(where, text, expected, did_you_mean(metric, names)))
        pick = min if mode == "min" else max
        return int(pick(found, key=lambda pair: pair[1])[0])


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    for name in values:
        check_name(name, f"{_WHERE}.log_epoch")
    metrics = _as_floats({prefix + name: value for name, value in values.items()})
    loss = metrics.get(prefix + "loss")
    if loss is not None:
        metrics.setdefault(prefix + "perplexity", math.exp(min(loss, 100.0)))
    return metrics


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {k: as_number(k, v, f"{_WHERE}.log_epoch") for k, v in values.items()}
    known = {k: v for k, v in numbers.items() if v is not None}
    return dict(zip(known, to_floats(list(known.values())), strict=True))
