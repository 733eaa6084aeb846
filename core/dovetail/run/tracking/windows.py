"""User metrics: the values of a window's micro-batches become one number each."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from dovetail.errors import ConfigError, build_message
from dovetail.run.tracking.values import Value, add_up, as_number, check_name, to_floats

Reduction: TypeAlias = Literal["mean", "sum", "last", "max", "min"]
"""How the values of a window become one number."""

Pending: TypeAlias = "list[tuple[Series, Value]]"

MAX_NAMES = 1000
"""Names after which one warning says that there are too many."""

_MAX_HELD = 4096


@dataclass(eq=False)
class Series:
    """One metric: what was logged in the open window, and what it comes to so far."""

    name: str
    reduction: Reduction
    is_across_ranks: bool
    values: list[Value] = field(default_factory=list)
    weights: list[Value] = field(default_factory=list)
    total: float = 0.0
    """Sum of the values; for a mean, of values times items."""
    weight: float = 0.0
    plain: float = 0.0
    count: int = 0
    bound: float = math.nan
    """The last value, or the largest or smallest one."""

    def settle(self, values: Sequence[float], weights: Sequence[float]) -> None:
        """Take in values and the items each is a mean over."""
        if self.reduction == "mean":
            # A mean over no item is 0/0 where it was computed, and has no say here.
            pairs = [(v, w) for v, w in zip(values, weights, strict=True) if w]
            self.total += add_up(v * w for v, w in pairs)
            self.weight += add_up(w for _, w in pairs)
            self.plain += add_up(values)
        elif self.reduction == "sum":
            self.total += add_up(values)
        elif self.reduction == "last":
            self.bound = values[-1]
        else:
            known = [*values, self.bound] if self.count else values
            pick = max if self.reduction == "max" else min
            self.bound = math.nan if any(map(math.isnan, known)) else pick(known)
        self.count += len(values)

    def result(self) -> float:
        """Return the number that the window comes to."""
        if self.reduction == "sum":
            return self.total
        if self.reduction != "mean":
            return self.bound
        # A single value is itself to the last digit, and one that was logged only where there was
        # no item still has a value.
        if self.count == 1 or not self.weight:
            return self.plain / self.count
        return self.total / self.weight

    def clear(self) -> None:
        """Begin a new window."""
        self.values, self.weights = [], []
        self.total = self.weight = self.plain = 0.0
        self.count = 0
        self.bound = math.nan


class WindowMetrics:
    """Gathers metrics that micro-batches log, until their window closes.

    A value waits until its micro-batch is done and its items are known (`fold`), and counts with
    them when the window closes. Any thread may add. Tensors stay on their device until then; one
    transfer brings all of them.

    Args:
        prefix: Put before names without a "/".
        reserved: Full names that may not be logged.
        where: Who is called, for messages.
        max_names: Names after which one warning says that there are too many.
    """

    def __init__(
        self,
        prefix: str = "",
        reserved: Iterable[str] = (),
        *,
        where: str = "log_metric",
        max_names: int = MAX_NAMES,
    ) -> None:
        self.pending: Pending = []
        """What was added since the last `fold`."""
        self._prefix = prefix
        self.reserved = set(reserved)
        """Full names that are the run's own."""
        self._where = where
        self._max_names = max_names
        self._series: dict[str, Series] = {}
        self._open: dict[Series, None] = {}
        self._shared: list[Series] = []
        self._num_held = 0
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Full names of everything that was logged so far, in any window."""
        return list(dict.fromkeys(series.name for series in self._series.values()))

    def add(
        self, name: str, value: Any, reduce: Reduction = "mean", across_ranks: bool = False
    ) -> None:
        """Add a value of the micro-batch that is under way.

        Raises:
            ConfigError: The name is empty, taken, or known with another reduction, or the value
                is no number.
        """
        check_name(name, self._where)
        series = self._series.get(name)
        if series is None:
            series = self._register(name, reduce, across_ranks)
        elif series.reduction != reduce or series.is_across_ranks != across_ranks:
            raise self._two_ways(series, reduce, across_ranks)
        number = as_number(name, value, self._where)
        if number is not None:
            with self._lock:
                self.pending.append((series, number))

    def take(self) -> Pending:
        """Return what was added and not folded, and forget it."""
        with self._lock:
            taken, self.pending = self.pending, []
        return taken

    def give(self, pending: Pending) -> None:
        """Put back what `take` returned."""
        if pending:
            with self._lock:
                self.pending[:0] = pending

    def fold(self, items: Any = 1) -> None:
        """Count what was added with the items of its micro-batch, a number or a scalar tensor."""
        pending = self.take()
        if not pending:
            return
        weight = items if type(items) is float else as_number("items", items, self._where)
        if weight is None:
            return
        for series, value in pending:
            series.values.append(value)
            series.weights.append(weight)
            self._open[series] = None
        self._num_held += len(pending)
        if self._num_held > _MAX_HELD:  # a long evaluation: what is held must not grow with it
            self._settle()

    def close(self) -> dict[str, float]:
        """Return the metrics of the window by full name, and begin a new one.

        Metrics that were ever logged across ranks are reduced over them now: all ranks close
        their windows together.
        """
        if self.pending:
            self.fold()
        if not self._open and not self._shared:
            return {}
        self._settle()
        found = {series.name: series.result() for series in self._open}
        if self._shared:
            from dovetail.run.tracking.ranks import reduce_over_ranks

            found.update(reduce_over_ranks(self._shared))
        self._clear()
        return found

    def drop(self) -> None:
        """Forget the window."""
        self.take()
        self._clear()

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names, given without the prefix, for the run itself.

        Raises:
            ConfigError: One of them was logged.
        """
        full = {self._prefix + name for name in names}
        if not full <= self.reserved:
            self.reserved |= full
            for series in self._series.values():
                self._check_free(series.name)

    def _register(self, name: str, reduce: Any, across_ranks: Any) -> Series:
        if reduce not in get_args(Reduction):
            expected = f"one of {', '.join(map(repr, get_args(Reduction)))}"
            raise ConfigError(build_message(self._of(name), f"reduce is {reduce!r}", expected))
        if across_ranks and reduce == "last":
            hint = 'Use "mean" or "max", or log it on each rank for itself.'
            found = "reduce is 'last' across ranks, which have no last one"
            raise ConfigError(build_message(self._of(name), found, action=hint))
        full = name if "/" in name else self._prefix + name
        self._check_free(full)
        with self._lock:
            # With prefix "train/", "aux" and "train/aux" are one metric.
            known = self._series.get(full) or self._series.get(full.removeprefix(self._prefix))
            series = known or Series(full, reduce, bool(across_ranks))
            if series.reduction != reduce or series.is_across_ranks != across_ranks:
                raise self._two_ways(series, reduce, across_ranks)
            self._series[name] = series
            if series.is_across_ranks and known is None:
                self._shared.append(series)
                self._shared.sort(key=lambda shared: shared.name)
            is_too_many = known is None and len(self._series) == self._max_names + 1
        if is_too_many:
            text = f"more than {self._max_names} different names were logged, such as {name!r}"
            hint = "Leave the step out of the name; each record has its own."
            warnings.warn(build_message(self._where, text, action=hint), stacklevel=4)
        return series

    def _check_free(self, full: str) -> None:
        if full in self.reserved:
            found = "the run logs a metric of this name itself"
            raise ConfigError(build_message(self._of(full), found, "another name"))

    def _two_ways(self, series: Series, reduce: Any, across_ranks: Any) -> ConfigError:
        def spell(reduction: Any, is_shared: Any) -> str:
            return f"reduce={reduction!r}" + (", across_ranks=True" if is_shared else "")

        before = spell(series.reduction, series.is_across_ranks)
        found = f"is logged with {spell(reduce, across_ranks)}, and was with {before}"
        hint = "Give one of the two another name."
        return ConfigError(build_message(self._of(series.name), found, "one reduction", hint))

    def _of(self, name: str) -> str:
        return f"{self._where} {name!r}"

    def _settle(self) -> None:
        open_series = [series for series in self._open if series.values]
        held: list[Value] = []
        for series in open_series:
            held += series.values
            held += series.weights
        numbers = to_floats(held)
        place = 0
        for series in open_series:
            middle = place + len(series.values)
            end = middle + len(series.weights)
            series.settle(numbers[place:middle], numbers[middle:end])
            series.values, series.weights = [], []
            place = end
        self._num_held = 0

    def _clear(self) -> None:
        for series in self._open:
            series.clear()
        self._open.clear()
        self._num_held = 0
