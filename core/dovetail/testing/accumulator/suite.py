"""Conformance of the accumulate hook: a step equals that of the one large batch."""

from __future__ import annotations

import math
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dovetail.testing.accumulator.accumulating import AccumulatingSuite, import_hypothesis, places
from dovetail.testing.accumulator.windows import split_windows
from dovetail.testing.batches import raise_unless
from dovetail.types import AccumulationStats

_TAIL_CHECKS = {
    "final": "test_final_batch_ends_the_window",
    "flush": "test_flush_ends_the_window",
}
_BAD: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda loss: loss * math.nan,
    "infinite": lambda loss: loss * math.inf,
    "infinite, with finite gradients,": lambda loss: loss + math.inf,
}


class AccumulatorSuite(AccumulatingSuite):
    """Checks of an accumulator, on a small model of the suite's own.

    One check draws windows with hypothesis: `pip install "dovetail[testing]"`.
    """

    def test_hook_makes_an_accumulator(self) -> None:
        """The part has every member of the protocol and has done nothing yet."""
        accumulator = self.build(self._trainee()).accumulator
        begin: dict[str, tuple[object, object]] = {
            "effective_step": (accumulator.effective_step, 0),
            "is_window_open": (accumulator.is_window_open, False),
            "last_window": (accumulator.last_window, None),
        }
        for name, (value, wanted) in begin.items():
            text = f"{name} begins as {value!r}"
            raise_unless(value == wanted, self.where, text, repr(wanted))
        stats = accumulator.stats
        found = f"stats is a {type(stats).__name__}"
        raise_unless(isinstance(stats, AccumulationStats), self.where, found, "AccumulationStats")

    def test_steps_are_honoured(self) -> None:
        """A window has as many micro-batches as the options say."""
        if self.steps_option is None:
            raise unittest.SkipTest("steps_option is None")
        for steps in (1, 2, 5):
            trainee = self._built(steps=steps)
            told = trainee.accumulator.accumulation_steps
            found = f"accumulation_steps is {told} with {self.steps_option} = {steps}"
            raise_unless(told == steps, self.where, found, str(steps))
            stepped = [trainee.feed(batch) for batch in self._batches([2] * steps)]
            found = f"{self.steps_option} = {steps} stepped after micro-batches {places(stepped)}"
            raise_unless(places(stepped) == [steps], self.where, found, f"after {steps}")

    def test_step_equals_the_large_batch(self) -> None:
        """Whatever the windows and their items, steps equal those of the one large batch."""
        hypothesis = import_hypothesis()
        self._built()
        strategies = hypothesis.strategies
        integers, choose = strategies.integers, strategies.sampled_from
        # What another check reports as broken is left out here, or it would hide the rest.
        is_tensor_fine = self._passes("test_tensor_weights_equal_numbers")
        kinds = ["number", "tensor"] if is_tensor_fine else ["number"]
        ends = [end for end, check in _TAIL_CHECKS.items() if self._passes(check)]
        examples = hypothesis.given(
            integers(1, 5),
            strategies.lists(integers(1, 9), min_size=1, max_size=12),
            choose(ends or [""]),
            choose(kinds),
        )
        # Nothing is written, and the same examples are tried every time.
        settings = hypothesis.settings(
            max_examples=self.num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(examples(self._check_windows))()

    def test_tensor_weights_equal_numbers(self) -> None:
        """Items told as a tensor, which waits for no device, give the step that numbers give."""
        numbers, tensors = self._built(torch.float64), self._built(torch.float64)
        steps = numbers.accumulator.accumulation_steps
        for batch in self._batches([1 + 6 * (i % 2) for i in range(2 * steps)], torch.float64):
            numbers.feed(batch)
            tensors.feed(batch, kind="tensor")
        self._check_equal(tensors, numbers, "weights given as tensors", "weights given as numbers")

    def test_final_batch_ends_the_window(self) -> None:
        """The final micro-batch takes the step of a short window, of its right size."""
        trainee = self._built(torch.float64)
        steps = trainee.accumulator.accumulation_steps
        batches = self._batches([4] * (steps + 1), torch.float64)
        stepped = [trainee.feed(b, is_final=b is batches[-1]) for b in batches]
        expected = [steps, steps + 1]
        found = f"{steps + 1} micro-batches, the last one final, stepped after {places(stepped)}"
        raise_unless(places(stepped) == expected, self.where, found, f"after {expected}")
        is_open = trainee.accumulator.is_window_open
        raise_unless(not is_open, self.where, "the window is open after it", "a closed window")
        self._check_large(trainee, split_windows(batches, steps), "a final batch's short window")

    def test_flush_ends_the_window(self) -> None:
        """`flush` takes the step of an open window, and nothing where none is open."""
        trainee = self._built(torch.float64, steps=4)
        steps = trainee.accumulator.accumulation_steps
        if steps == 1:
            raise unittest.SkipTest("a window of one micro-batch is never open")
        found = "flush stepped without an open window"
        raise_unless(not trainee.accumulator.flush(trainee.model), self.where, found, "False")
        batches = self._batches([4] * (steps + 1), torch.float64)
        for batch in batches:
            trainee.feed(batch)
        has_stepped = trainee.accumulator.flush(trainee.model)
        raise_unless(has_stepped, self.where, "flush of an open window took no step", "True")
        again = trainee.accumulator.flush(trainee.model)
        raise_unless(not again, self.where, "a second flush stepped again", "False")
        self._check_large(trainee, split_windows(batches, steps), "a flushed window")

    def test_counts_are_right(self) -> None:
        """`effective_step` counts optimizer steps, `is_window_open` and `stats` agree with it."""
        trainee = self._built()
        accumulator, steps = trainee.accumulator, trainee.accumulator.accumulation_steps
        for index, batch in enumerate(self._batches([2] * (3 * steps + 1)), start=1):
            has_stepped, stats = trainee.feed(batch), accumulator.stats
            pairs = {
                "accumulate's answer": (has_stepped, index % steps == 0),
                "effective_step": (accumulator.effective_step, index // steps),
                "is_window_open": (accumulator.is_window_open, index % steps != 0),
                "stats.total_steps": (stats.total_steps, index),
                "stats.optimizer_steps": (stats.optimizer_steps, index // steps),
                "stats.current_accumulation": (stats.current_accumulation, index % steps),
                "stats.is_accumulating": (stats.is_accumulating, index % steps != 0),
            }
            for name, (found, expected) in pairs.items():
                text = f"{name} is {found!r} after {index} micro-batches of windows of {steps}"
                raise_unless(found == expected, self.where, text, repr(expected))

    def test_last_window_tells_what_happened(self) -> None:
        """`last_window` holds the mean loss over the window's items, their number, and the norm."""
        trainee, large = self._built(torch.float64), self._trainee(torch.float64)
        steps = trainee.accumulator.accumulation_steps
        window = self._batches([1 + 6 * (i % 2) for i in range(steps)], torch.float64)
        loss, norm = large.step_large(window)
        for batch in window:
            trainee.feed(batch)
        result = trainee.accumulator.last_window
        if result is None:
            raise_unless(False, self.where, "last_window is None after a step", "a WindowResult")
            return
        pairs: dict[str, tuple[Any, Any]] = {
            "loss": (result.loss, loss),
            "items": (result.items, sum(map(len, window))),
            "num_micro_batches": (result.num_micro_batches, steps),
            "is_skipped": (result.is_skipped, False),
        }
        if result.grad_norm is not None:
            pairs["grad_norm"] = (result.grad_norm, norm)
        for name, (found, expected) in pairs.items():
            text = f"last_window.{name} is {found!r}"
            is_right = math.isclose(found, expected, rel_tol=1e-6)
            raise_unless(is_right, self.where, text, f"{expected!r}, that of the large batch")

    def test_non_finite_loss_is_skipped(self) -> None:
        """A loss that is not finite takes no step, counts nowhere and ends with its window."""
        for name, spoil in _BAD.items():
            trainee, healthy = self._built(torch.float64), self._built(torch.float64)
            accumulator, steps = trainee.accumulator, trainee.accumulator.accumulation_steps
            first, bad, last = split_windows(self._batches([2] * (3 * steps), torch.float64), steps)
            for batch in first:
                trainee.feed(batch)
                healthy.feed(batch)
            before = trainee.weights
            stepped = [trainee.feed(b, spoil=spoil if b is bad[0] else None) for b in bad]
            window, where = accumulator.last_window, f"{self.where}, a loss that is {name}"
            is_same = bool(torch.equal(trainee.weights, before))
            raise_unless(is_same, where, "changed the weights", "weights as they were")
            raise_unless(not any(stepped), where, "accumulate answered True", "False")
            count = accumulator.effective_step
            raise_unless(count == 1, where, f"effective_step is {count}", "1, the step before it")
            is_told = window is not None and window.is_skipped
            raise_unless(is_told, where, "last_window.is_skipped is not True", "True")
            for batch in last:
                trainee.feed(batch)
                healthy.feed(batch)
            is_same = bool(torch.equal(trainee.weights, healthy.weights))
            expected = "those of a run without it"
            raise_unless(is_same, where, "changed the weights of the window after it", expected)

    def test_state_continues_to_the_bit(self) -> None:
        """A run that is saved and loaded in mid-window goes on as if nothing had happened."""
        steps = self._built().accumulator.accumulation_steps
        batches = self._batches([1 + i % 4 for i in range(2 * steps + 1)])
        whole = self._built()
        self._feed_all(whole, batches)
        for stop in range(len(batches)):
            first = self._built()
            for batch in batches[:stop]:
                first.feed(batch)
            second = self._built()
            second.load_state(self._through_a_file(first.state()))
            self._feed_all(second, batches[stop:])
            found = f"saved and loaded after {stop} of {len(batches)} micro-batches, weights differ"
            is_same = bool(torch.equal(second.weights, whole.weights))
            raise_unless(is_same, self.where, found, "those of an uninterrupted run, to the bit")
            counts = second.accumulator.effective_step, whole.accumulator.effective_step
            found = f"effective_step is {counts[0]} after loading in micro-batch {stop}"
            raise_unless(counts[0] == counts[1], self.where, found, str(counts[1]))

    def test_reset_epoch_drops_the_window(self) -> None:
        """`reset_epoch` takes no step, and leaves no gradient to the next window."""
        trainee, fresh = self._built(), self._built()
        accumulator, steps = trainee.accumulator, trainee.accumulator.accumulation_steps
        if steps == 1:
            raise unittest.SkipTest("a window of one micro-batch is never open")
        dropped, *window = self._batches([3] * (steps + 1))
        before = trainee.weights
        trainee.feed(dropped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning of what was dropped is welcome
            accumulator.reset_epoch()
        is_same = bool(torch.equal(trainee.weights, before)) and accumulator.effective_step == 0
        raise_unless(is_same, self.where, "reset_epoch took a step", "none")
        is_open = accumulator.is_window_open
        raise_unless(not is_open, self.where, "the window is open after reset_epoch", "closed")
        self._feed_all(trainee, window)
        self._feed_all(fresh, window)
        found = "the window after reset_epoch differs from that of a fresh accumulator"
        is_same = bool(torch.equal(trainee.weights, fresh.weights))
        raise_unless(is_same, self.where, found, "no gradient of the dropped window in it")

    def test_clipping_equals_that_of_the_large_batch(self) -> None:
        """Gradients are clipped to `max_grad_norm` as `clip_grad_norm_` clips the large batch's."""
        if self.max_grad_norm is None:
            raise unittest.SkipTest("max_grad_norm is None")
        for factor in (300.0, 1.0):  # far above the norm, and well below it
            trainee = self._built(torch.float64, factor=factor)
            steps = trainee.accumulator.accumulation_steps
            windows = split_windows(self._batches([4] * (2 * steps), torch.float64), steps)
            self._feed_all(trainee, [batch for window in windows for batch in window])
            self._check_large(trainee, windows, f"a clipped step (losses times {factor:g})")

    def test_gradient_scaler_is_honoured(self) -> None:
        """A gradient scaler changes no step, and an overflow of scaled gradients takes none."""
        plain, scaler = self._built(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaled = self._built(scaler=scaler)
        steps = plain.accumulator.accumulation_steps
        batches = self._batches([3] * (2 * steps))
        for trainee in (plain, scaled):
            self._feed_all(trainee, batches)
        self._check_equal(scaled, plain, "a gradient scaler", "no scaler", torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        trainee = self._built(factor=1e4, scaler=scaler)
        before = trainee.weights
        stepped = [trainee.feed(batch) for batch in batches[:steps]]
        is_same = bool(torch.equal(trainee.weights, before)) and not any(stepped)
        is_same = is_same and trainee.accumulator.effective_step == 0
        found = "a window whose scaled gradients overflow took a step"
        raise_unless(is_same, self.where, found, "none, and no count of it")
        is_lower = scaler.get_scale() < 2.0**127
        raise_unless(is_lower, self.where, "the scale stayed after an overflow", "a lower one")
