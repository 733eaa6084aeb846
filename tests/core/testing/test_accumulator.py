from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dovetail import PluginOptions, hookimpl
from dovetail.errors import MissingDependencyError
from dovetail.testing import AccumulatorSuite
from dovetail.testing.accumulator.accumulating import import_hypothesis
from dovetail.types import AccumulationStats, WindowResult


class Options(PluginOptions):
    steps: int = 1
    max_norm: float | None = None


class Sums:
    """A right accumulator: sums the gradients of `n * l`, and divides them once by `sum(n)`."""

    def __init__(self, optimizer, scaler, options) -> None:
        self.optimizer, self.scaler, self.max_norm = optimizer, scaler, options.max_norm
        self.accumulation_steps = options.steps
        self.total_steps = self.effective_step = self.count = 0
        self.items = self.loss = 0.0
        self.last_window = None

    @property
    def is_window_open(self):
        return self.count > 0

    @property
    def stats(self):
        steps, total = self.effective_step, self.total_steps
        return AccumulationStats(total, steps, self.count, 1, self.is_window_open, None)

    def micro_batch(self, is_final_batch=False):
        return nullcontext()

    def accumulate(self, loss, model, weight=1, is_final_batch=False):
        weight = float(weight)
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        (scaled * self.share(weight)).backward()
        self.count += 1
        self.total_steps += 1
        self.items += weight
        self.loss += self.share(weight) * loss.item()
        return self.close() if self.is_at_end(is_final_batch) else False

    def share(self, weight):
        return weight

    def divisor(self):
        return self.items

    def is_at_end(self, is_final_batch):
        return is_final_batch or self.count == self.accumulation_steps

    def is_usable(self, loss, norm):
        return bool(torch.isfinite(torch.tensor(loss)) and torch.isfinite(norm))

    def close(self):
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad /= self.divisor()
        limit = float("inf") if self.max_norm is None else self.max_norm
        norm = self.clip(parameters, limit)
        loss = self.loss / self.divisor()
        has_stepped = self.is_usable(loss, norm)
        if has_stepped:
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self.effective_step += has_stepped
        self.last_window = WindowResult(loss, self.items, norm.item(), self.count, not has_stepped)
        self.drop()
        return has_stepped

    def clip(self, parameters, limit):
        return nn.utils.clip_grad_norm_(parameters, limit)

    def drop(self):
        self.count, self.items, self.loss = 0, 0.0, 0.0
        self.optimizer.zero_grad()

    def flush(self, model):
        return self.close() if self.is_window_open else False

    def reset_epoch(self):
        self.drop()

    def state_dict(self):
        parameters = self.optimizer.param_groups[0]["params"]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        counts = [self.total_steps, self.effective_step, self.count, self.items, self.loss]
        return {"counts": counts, "gradients": gradients}

    def load_state_dict(self, state):
        counts = state["counts"]
        self.total_steps, self.effective_step, self.count, self.items, self.loss = counts
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, state["gradients"], strict=False):
            parameter.grad = gradient.clone()


class CountsMicroBatches(Sums):
    """The textbook's mean of means, over the micro-batches that there were."""

    def share(self, weight):
        return 1.0

    def divisor(self):
        return self.count


class DividesBySteps(CountsMicroBatches):
    """The textbook's loop: over the micro-batches of a full window."""

    def divisor(self):
        return self.accumulation_steps


class RoundsShares(Sums):
    """Good enough for fp32, and not for fp64."""

    shares = 0.0

    def share(self, weight):
        return weight ** (1 + 1e-9)

    def accumulate(self, loss, model, weight=1, is_final_batch=False):
        self.shares += self.share(float(weight))
        return super().accumulate(loss, model, weight, is_final_batch)

    def divisor(self):
        return self.shares

    def drop(self):
        super().drop()
        self.shares = 0.0

    def state_dict(self):
        return {**super().state_dict(), "shares": self.shares}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.shares = state["shares"]


class IgnoresSteps(Sums):
    def __init__(self, optimizer, scaler, options) -> None:
        super().__init__(optimizer, scaler, options.model_copy(update={"steps": 4}))


class RefusesTensors(Sums):
    def accumulate(self, loss, model, weight=1, is_final_batch=False):
        weight = 1 if isinstance(weight, torch.Tensor) else weight
        return super().accumulate(loss, model, weight, is_final_batch)


class IgnoresFinalBatch(Sums):
    def is_at_end(self, is_final_batch):
        return self.count == self.accumulation_steps


class ForgetsTail(Sums):
    def flush(self, model):
        if self.is_window_open:
            self.drop()
        return False


class FlushesTwice(Sums):
    def flush(self, model):
        if self.is_window_open:
            return self.close()
        return self.effective_step > 0


class CountsEachMicroBatch(Sums):
    @property
    def stats(self):
        steps = self.total_steps
        return AccumulationStats(steps, steps, self.count, 1, self.is_window_open, None)


class TellsLastLoss(Sums):
    def accumulate(self, loss, model, weight=1, is_final_batch=False):
        before = self.last_window
        has_stepped = super().accumulate(loss, model, weight, is_final_batch)
        if self.last_window is not before and has_stepped:
            w = self.last_window
            self.last_window = WindowResult(
                loss.item(), w.items, w.grad_norm, w.num_micro_batches, w.is_skipped
            )
        return has_stepped


class StepsOnNaN(Sums):
    def is_usable(self, loss, norm):
        return self.scaler is None or bool(torch.isfinite(norm))


class LooksAtGradientsOnly(Sums):
    def is_usable(self, loss, norm):
        return bool(torch.isfinite(norm))


class CountsSkipped(Sums):
    """Steps nothing that is not finite, and counts it all the same."""

    def close(self):
        before = self.effective_step
        has_stepped = super().close()
        if self.scaler is None:
            self.effective_step = before + 1
        return has_stepped


class ForgetsWindow(Sums):
    def state_dict(self):
        state = super().state_dict()
        return {"counts": [*state["counts"][:2], 0, 0.0, 0.0], "gradients": []}


class SavesObjects(Sums):
    def state_dict(self):
        return {**super().state_dict(), "owner": object}


class LeaksGradient(Sums):
    def reset_epoch(self):
        self.count, self.items, self.loss = 0, 0.0, 0.0


class StepsOnReset(Sums):
    def reset_epoch(self):
        if self.is_window_open:
            self.close()


class ClipsEachTensor(Sums):
    def clip(self, parameters, limit):
        norms = [nn.utils.clip_grad_norm_([parameter], limit) for parameter in parameters]
        return torch.stack(norms).norm()


class IgnoresScaler(Sums):
    def __init__(self, optimizer, scaler, options) -> None:
        super().__init__(optimizer, None, options)


class BeginsWithWindow(Sums):
    def __init__(self, optimizer, scaler, options) -> None:
        super().__init__(optimizer, scaler, options)
        self.last_window = WindowResult(0.0, 0.0, None, 0, False)


class Plugin:
    """Accumulates with a class that it is given."""

    def __init__(self, kind) -> None:
        self.kind = kind

    @hookimpl
    def dovetail_accumulate(self, optimizer, scaler, options: Options):
        return self.kind(optimizer, scaler, options)


class Quick(AccumulatorSuite):
    num_examples = 12


def failures(kind, **attributes):
    attributes = {"plugin": Plugin(kind), **attributes}
    return dict(type("Toy", (Quick,), attributes)().failures())


CLIPPING = {"options": {"max_norm": 0.3}, "max_grad_norm": 0.3}


def test_suite_passes_a_right_accumulator() -> None:
    AccumulatorSuite.check(plugin=Plugin(Sums))


def test_suite_passes_a_right_accumulator_that_clips() -> None:
    AccumulatorSuite.check(plugin=Plugin(Sums), **CLIPPING)


def test_suite_passes_a_fixed_number_of_steps() -> None:
    assert failures(IgnoresSteps, steps_option=None) == {}


FAULTS = {
    CountsMicroBatches: {"step_equals_the_large_batch", "last_window_tells_what_happened"},
    RoundsShares: {"step_equals_the_large_batch"},
    IgnoresSteps: {"steps_are_honoured"},
    RefusesTensors: {"tensor_weights_equal_numbers"},
    IgnoresFinalBatch: {"final_batch_ends_the_window"},
    ForgetsTail: {"flush_ends_the_window"},
    FlushesTwice: {"flush_ends_the_window"},
    CountsEachMicroBatch: {"counts_are_right"},
    TellsLastLoss: {"last_window_tells_what_happened"},
    StepsOnNaN: {"non_finite_loss_is_skipped"},
    LooksAtGradientsOnly: {"non_finite_loss_is_skipped"},
    CountsSkipped: {"non_finite_loss_is_skipped"},
    ForgetsWindow: {"state_continues_to_the_bit"},
    SavesObjects: {"state_continues_to_the_bit"},
    LeaksGradient: {"reset_epoch_drops_the_window"},
    StepsOnReset: {"reset_epoch_drops_the_window"},
    IgnoresScaler: {"gradient_scaler_is_honoured"},
    BeginsWithWindow: {"hook_makes_an_accumulator"},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_suite_reports_a_seeded_fault_by_its_check(kind) -> None:
    found = failures(kind)
    assert found.keys() == FAULTS[kind], found


def test_suite_reports_the_textbook_loop() -> None:
    found = failures(DividesBySteps)
    assert found.keys() >= {
        "step_equals_the_large_batch",
        "final_batch_ends_the_window",
        "flush_ends_the_window",
    }
    assert "the weights differ from those of the one large batch by" in str(found)


def test_suite_reports_clipping_that_differs() -> None:
    assert failures(ClipsEachTensor, **CLIPPING).keys() == {
        "clipping_equals_that_of_the_large_batch"
    }
    # Options that do not clip, where the suite is told that they do.
    assert failures(Sums, max_grad_norm=0.3).keys() == {"clipping_equals_that_of_the_large_batch"}


def test_suite_reports_a_part_that_lacks_a_member() -> None:
    found = failures(lambda optimizer, scaler, options: nullcontext())
    assert found.keys() == {"hook_makes_an_accumulator"}
    assert "without accumulate, accumulation_steps, effective_step" in str(found)


def test_suite_names_the_window_that_differs() -> None:
    found = failures(CountsMicroBatches)["step_equals_the_large_batch"]
    # The smallest that hypothesis finds: one window of two micro-batches, one item and two.
    assert "windows of [[1, 2]] items" in found or "windows of [[2, 1]] items" in found
    assert "expected a relative error <= 1e-06" in found


def test_suite_says_what_to_install_when_hypothesis_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[testing\]"'):
        import_hypothesis()
    assert failures(Sums).keys() == {"step_equals_the_large_batch"}


def test_suite_writes_nothing_into_the_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert failures(Sums) == {}
    assert list(tmp_path.iterdir()) == []
