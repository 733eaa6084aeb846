"""How the accumulator suite trains, and what it holds the result against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from dovetail.errors import MissingDependencyError, build_message
from dovetail.testing.accumulator.windows import (
    MicroBatch,
    Trainee,
    WeightKind,
    make_micro_batches,
    relative_error,
    split_windows,
)
from dovetail.testing.batches import raise_unless
from dovetail.testing.suite import ConformanceError, Suite, reported_by

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Largest relative error of the weights, by dtype."""

_STEPS = 3


class AccumulatingSuite(Suite):
    """What the checks of an accumulator are made of."""

    hook = "accumulate"
    steps_option: str | None = "steps"
    """Option that sets the micro-batches of a window; `None` where they cannot be set."""
    max_grad_norm: float | None = None
    """L2 norm that the accumulator clips to with these `options`; `None` if it does not clip."""
    num_examples: int = 40
    """Windows that hypothesis draws, for each dtype."""

    def build(self, trainee: Trainee, steps: int = _STEPS, scaler: Any = None) -> Trainee:
        """Make the accumulator of a model as a run does.

        Args:
            trainee: The model and its optimizer; it gets the accumulator.
            steps: Micro-batches of a window.
            scaler: A gradient scaler.
        """
        registry = self.registry()
        own = {} if self.steps_option is None else {self.steps_option: steps}
        options = registry.build_options("accumulate", self.name, {**self.options, **own})
        trainee.accumulator = registry.accumulate(
            self.name, trainee.model, trainee.optimizer, scaler, options
        )
        return trainee

    def _trainee(self, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Trainee:
        return Trainee(self.max_grad_norm, dtype, factor)

    def _built(
        self,
        dtype: torch.dtype = torch.float32,
        steps: int = _STEPS,
        factor: float = 1.0,
        scaler: Any = None,
    ) -> Trainee:
        with reported_by("test_hook_makes_an_accumulator"):
            return self.build(self._trainee(dtype, factor), steps, scaler)

    def _batches(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> list[MicroBatch]:
        return make_micro_batches(sizes, dtype)

    def _feed_all(self, trainee: Trainee, batches: Sequence[MicroBatch]) -> None:
        for index, batch in enumerate(batches, start=1):
            trainee.feed(batch, is_final=index == len(batches))

    def _passes(self, check: str) -> bool:
        try:
            getattr(self, check)()
        except Exception:
            return False
        return True

    def _through_a_file(self, states: Sequence[Any]) -> Sequence[Any]:
        buffer = io.BytesIO()
        torch.save(list(states), buffer)
        buffer.seek(0)
        try:
            loaded: list[Any] = torch.load(buffer, weights_only=True)
        except Exception as err:
            text = (str(err).splitlines() or [""])[0]
            found = f"state_dict does not load with weights_only: {text}"
            message = build_message(self.where, found, "tensors and numbers")
            raise ConformanceError(message) from err
        return loaded

    def _check_windows(self, steps: int, sizes: list[int], end: str, kind: WeightKind) -> None:
        """Check windows of drawn sizes.

        Args:
            steps: Micro-batches of a full window.
            sizes: Items of each micro-batch.
            end: How a short last window ends: "final" or "flush"; "" leaves it out.
            kind: How the items are told.
        """
        for dtype in TOLERANCE:
            trainee = self._built(dtype, steps=steps)
            steps = trainee.accumulator.accumulation_steps
            num_whole = len(sizes) - len(sizes) % steps
            batches = self._batches(sizes if end else sizes[:num_whole], dtype)
            for batch in batches:
                trainee.feed(batch, end == "final" and batch is batches[-1], kind)
            if end == "flush":
                trainee.accumulator.flush(trainee.model)
            windows = split_windows(batches, steps)
            told = [list(map(len, window)) for window in windows]
            if windows:
                self._check_large(trainee, windows, f"windows of {told} items ({kind}, {end})")

    def _check_large(self, trainee: Trainee, windows: list[list[MicroBatch]], what: str) -> None:
        large = replace(trainee)
        for window in windows:
            large.step_large(window)
        self._check_equal(trainee, large, what, "the one large batch")

    def _check_equal(
        self,
        trainee: Trainee,
        other: Trainee,
        what: str,
        reference: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or trainee.dtype
        error, limit = relative_error(trainee.weights, other.weights), TOLERANCE[dtype]
        found = f"{what}: the weights differ from those of {reference} by {error:.1e} ({dtype})"
        raise_unless(error <= limit, self.where, found, f"a relative error <= {limit:.0e}")


def import_hypothesis() -> ModuleType:
    """Return hypothesis.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import hypothesis
        import hypothesis.strategies
    except ImportError as err:
        found = "needs the package hypothesis, which is not installed"
        hint = 'Run: pip install "dovetail[testing]"'
        raise MissingDependencyError(build_message("AccumulatorSuite", found, action=hint)) from err
    return hypothesis


def places(stepped: Sequence[bool]) -> list[int]:
    """Return after which micro-batches, from 1, a step was taken."""
    return [index for index, has_stepped in enumerate(stepped, start=1) if has_stepped]
