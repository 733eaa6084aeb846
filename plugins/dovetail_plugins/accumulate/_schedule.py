"""How long a window is: a number of micro-batches that may change, or a number of items."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TypeAlias

from dovetail.errors import ConfigError, build_message

Steps: TypeAlias = int | Mapping[int, int]
"""Micro-batches per optimizer step: one number, or each from the optimizer step that is its key."""


class WindowSchedule:
    """Micro-batches per optimizer step, by the optimizer step.

    Args:
        steps: One number, or a mapping from the optimizer step, counted from 0, to the number that
            holds from there on.
        items_per_step: Items per optimizer step instead; `steps` is 1 then.

    Raises:
        ConfigError: A number is no integer or too small, the mapping does not begin at 0, or both
            are given.
    """

    def __init__(self, steps: Steps, items_per_step: int | None = None) -> None:
        table = dict(sorted(steps.items())) if isinstance(steps, Mapping) else {0: steps}
        for key, value in table.items():
            check_count("accumulation_steps", value)
            check_count("accumulation_steps: step", key, at_least=0)
        if 0 not in table:
            raise ConfigError(
                message(
                    f"accumulation_steps begins at {next(iter(table), 'no')} step",
                    "Give the number of step 0, too.",
                )
            )
        if items_per_step is not None:
            check_count("tokens_per_step", items_per_step)
            if table != {0: 1}:
                raise ConfigError(
                    message(
                        f"accumulation_steps {steps!r} and tokens_per_step {items_per_step} both "
                        "end a window",
                        "Set one of them.",
                    )
                )
        self._starts = list(table)
        self._steps = list(table.values())
        self.items_per_step = items_per_step

    @property
    def is_constant(self) -> bool:
        """Whether every full window has equally many micro-batches."""
        return len(self._steps) == 1

    @property
    def most(self) -> int | None:
        """Micro-batches of the longest window; `None` if nobody knows."""
        return max(self._steps) if self.items_per_step is None else None

    @property
    def may_accumulate(self) -> bool:
        """Whether a window may have several micro-batches."""
        return self.most != 1

    def at(self, optimizer_step: int) -> int:
        """Return the micro-batches of the full window that ends with this optimizer step."""
        return self._steps[bisect_right(self._starts, optimizer_step) - 1]

    def count(self, num_batches: int, num_epochs: int) -> int | None:
        """Return the optimizer steps of epochs of `num_batches`; `None` if items end a window."""
        if self.items_per_step is not None:
            return None
        if self.is_constant:
            return num_epochs * -(-num_batches // self._steps[0])
        steps = 0
        for _ in range(num_epochs):
            left = num_batches
            while left > 0:
                left -= self.at(steps)
                steps += 1
        return steps


def check_count(name: str, value: object, at_least: int = 1) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `at_least`."""
    if type(value) is not int:
        raise ConfigError(message(f"{name} must be an integer, got {value!r}"))
    if value < at_least:
        raise ConfigError(message(f"{name} must be >= {at_least}, got {value}"))


def check_additive(schedule: WindowSchedule) -> None:
    """Raise `ConfigError` if a loss that is not additive would be accumulated."""
    if schedule.may_accumulate:
        raise ConfigError(
            build_message(
                "GradientAccumulator",
                f"{schedule.most or 'several'} micro-batches per step with a loss that is not "
                "additive over its items",
                "1, as such a loss compares the items of a batch, and those of two micro-batches "
                "never meet",
                "Use larger batches, with activation checkpointing where memory ends.",
            )
        )


def message(found: str, action: str = "") -> str:
    """Return the text of an error of the accumulator's arguments."""
    return build_message("GradientAccumulator", found, action=action)
