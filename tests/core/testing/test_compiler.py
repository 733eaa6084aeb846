from __future__ import annotations

import copy
import unittest
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dovetail import PluginOptions, hookimpl
from dovetail.testing import CompilerSuite

# Dynamo's word on one release of Python, not on what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")


class Plugin:
    """Compiles with a function that it is given."""

    def __init__(self, function) -> None:
        self.function = function

    @hookimpl
    def dovetail_compile(self, model, options: PluginOptions):
        return self.function(model)


class Guard:
    """Calls the compiled form, and the eager one for good once that fails."""

    word = "the model runs in eager execution"
    restores_generator = restores_buffers = True

    def __init__(self, model, compiled) -> None:
        self.model, self.compiled, self.eager = model, compiled, model._call_impl
        self.is_tried = False

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        generator = torch.get_rng_state()
        try:
            self.try_backward(args, kwargs)
            torch.set_rng_state(generator)
            return self.compiled(*args, **kwargs)
        except Exception as err:
            if self.restores_generator:
                torch.set_rng_state(generator)
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(before[name] if self.restores_buffers else buffer)
            self.model._compiled_call_impl = None
            self.tell(err)
        return self.eager(*args, **kwargs)

    def try_backward(self, args, kwargs):
        """Compile the backward before the first step, on a copy's buffers."""
        if self.is_tried or not self.model.training or not torch.is_grad_enabled():
            return
        self.is_tried = True
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        output = self.compiled(*args, **kwargs)
        torch.autograd.grad(output.sum(), list(self.model.parameters()))
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])

    def tell(self, err):
        warnings.warn(f"{self.word}: {err}", UserWarning, stacklevel=2)


def compile_in_place(model, guard=Guard, **settings):
    model.compile(**{"backend": "eager", **settings})
    if guard is not None:
        model._compiled_call_impl = guard(model, model._compiled_call_impl)
    return model


def write_by_hand(model, guard=Guard):
    """What a compiler might make of the suite's classifier, without the seconds it takes."""

    def compiled(features):
        norm = model.norm
        if model.training:
            norm.num_batches_tracked += 1
        buffers = norm.running_mean, norm.running_var
        hidden = F.linear(features, model.first.weight, model.first.bias)
        hidden = F.batch_norm(hidden, *buffers, norm.weight, norm.bias, training=model.training)
        return F.linear(torch.tanh(hidden), model.last.weight, model.last.bias)

    model._compiled_call_impl = guard(model, compiled)
    return model


def return_wrapper(model):
    return torch.compile(model, backend="eager")


def return_another_class(model):
    other = nn.Module()
    vars(other).update(vars(model))
    return write_by_hand(other)


def return_eager(model):
    return model


def return_copy(model):
    return write_by_hand(copy.deepcopy(model))


class Trained(Guard):
    """Compiled while it trains, and eager in evaluation."""

    def __call__(self, *args, **kwargs):
        if not self.model.training:
            return self.eager(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class Shifted(Guard):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) + 1e-3


class ShiftedInEvaluation(Guard):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) + 1e-3 * (not self.model.training)


class FixedShape(Guard):
    """Pads every batch to the first one's size, as a compiler of static shapes may."""

    size = None

    def __call__(self, features):
        self.size = self.size or len(features)
        return super().__call__(features[: self.size])


class ShiftedGradient(Guard):
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        return output + 0.1 * (output - output.detach())


class StaleWeights(Guard):
    """Keeps the weights of the first evaluation."""

    def __call__(self, *args, **kwargs):
        if self.model.training:
            return super().__call__(*args, **kwargs)
        if not hasattr(self, "state"):
            self.state = self.initial
        current = copy.deepcopy(self.model.state_dict())
        kept = {name: value for name, value in self.state.items() if "norm" not in name}
        self.model.load_state_dict({**current, **kept})
        output = super().__call__(*args, **kwargs)
        self.model.load_state_dict(current)
        return output

    def __init__(self, model, compiled) -> None:
        super().__init__(model, compiled)
        self.initial = copy.deepcopy(model.state_dict())


class StaleInTraining(Guard):
    """Trains with the weights it was compiled with; their gradients reach the parameters."""

    def __init__(self, model, compiled) -> None:
        super().__init__(model, compiled)
        self.initial = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self, features):
        if not self.model.training:
            return super().__call__(features)
        stale = {n: p + (self.initial[n] - p).detach() for n, p in self.model.named_parameters()}
        self.model._compiled_call_impl = None
        output = torch.func.functional_call(self.model, stale, (features,))
        self.model._compiled_call_impl = self
        return output


class Silent(Guard):
    def tell(self, err):
        pass


class Unrestored(Guard):
    """Falls back with the buffers of the failed attempt."""

    def __call__(self, *args, **kwargs):
        was_compiled = self.model._compiled_call_impl is self
        output = super().__call__(*args, **kwargs)
        if was_compiled and self.model._compiled_call_impl is None:
            return output + 1e-6
        return output


class ForgetsDraws(Guard):
    restores_generator = False


class ForgetsBuffers(Guard):
    restores_buffers = False


class Lazy(Guard):
    """Does not think of the backward."""

    def try_backward(self, args, kwargs):
        pass


FALLBACK = {
    "forward_that_does_not_compile_runs_eagerly",
    "backward_that_does_not_compile_runs_eagerly",
}


MIDWAY = "failure_in_mid_call_leaves_no_trace"


def failures(function, **attributes):
    attributes = {"plugin": Plugin(function), **attributes}
    return dict(type("Toy", (CompilerSuite,), attributes)().failures())


def only(*names):
    """Attributes that leave out every other check."""
    kept = {f"test_{name}" for name in names}
    return {name: None for name in CompilerSuite.checks() if name not in kept}


def guarded(guard, make=write_by_hand):
    return lambda model: make(model, guard)


def test_suite_passes_a_right_compiler() -> None:
    CompilerSuite.check(plugin=Plugin(compile_in_place))


class Gated(nn.Module):
    """A model of an author's: two inputs, two outputs, and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)

    def forward(self, x, mask):
        return {"logits": self.value(x) * mask, "gates": (self.gate(x), mask)}


def test_suite_takes_a_model_of_the_authors() -> None:
    def build_batches(self):
        masks = [torch.ones(size, 1, dtype=torch.int64) for size in (2, 5)]
        return [{"x": torch.ones(len(mask), 4), "mask": mask} for mask in masks]

    def compile_whole(model):
        return compile_in_place(model, None, fullgraph=True)

    attributes = {"build_model": lambda self: Gated(), "build_batches": build_batches}
    attributes |= {f"test_{name}": None for name in (*FALLBACK, MIDWAY)}  # it has none
    assert failures(compile_whole, **attributes) == {}


def test_suite_passes_a_compiler_without_dynamo() -> None:
    suite = type("Toy", (CompilerSuite,), {"plugin": Plugin(write_by_hand), "uses_dynamo": False})()
    assert dict(suite.failures()) == {}
    for name in (*FALLBACK, MIDWAY):
        with pytest.raises(unittest.SkipTest, match="override plant_failure"):
            getattr(suite, f"test_{name}")()


FAULTS = {
    "wrapper": (return_wrapper, {"hook_gives_a_model"}),
    "another class": (return_another_class, {"class_and_keys_are_kept"}),
    "eager": (return_eager, {"calls_run_compiled_code"}),
    "copy": (return_copy, {"parameters_are_the_same_objects"}),
    "eager in evaluation": (guarded(Trained), {"calls_run_compiled_code"}),
    "shifted": (guarded(Shifted), {"outputs_and_gradients_agree"}),
    "shifted gradient": (guarded(ShiftedGradient), {"outputs_and_gradients_agree"}),
    "shifted in evaluation": (guarded(ShiftedInEvaluation), {"eval_mode_agrees"}),
    "fixed shape": (guarded(FixedShape), {"second_shape_works"}),
    "stale in training": (
        guarded(StaleInTraining),
        {"training_continues", "calls_run_compiled_code"},  # it runs the layers, too
    ),
    "stale weights": (guarded(StaleWeights), {"saved_weights_load_into_the_model"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_suite_reports_a_seeded_fault_by_its_check(fault) -> None:
    function, expected = FAULTS[fault]
    found = failures(function, uses_dynamo=False)
    assert found.keys() == expected, found


@pytest.mark.parametrize("guard", [None, Silent, Unrestored])
def test_suite_reports_a_compiler_without_a_right_fallback(guard) -> None:
    checks = only("calls_run_compiled_code", *FALLBACK)
    found = failures(guarded(guard, compile_in_place), **checks)
    assert found.keys() == FALLBACK, found


@pytest.mark.parametrize(
    ("guard", "shown"),
    [
        (ForgetsDraws, "its output is another"),
        (ForgetsBuffers, "buffers differ: the values of 'first.0."),
        (Unrestored, "its output is another"),
    ],
)
def test_suite_reports_what_a_failed_call_leaves_behind(guard, shown) -> None:
    found = failures(guarded(guard, compile_in_place), **only(MIDWAY))
    assert found.keys() == {MIDWAY}
    assert f"after a call that failed midway, {shown}" in found[MIDWAY]


def test_suite_reports_a_compiler_that_does_not_think_of_the_backward() -> None:
    checks = only("calls_run_compiled_code", *FALLBACK)
    found = failures(guarded(Lazy, compile_in_place), **checks)
    assert found.keys() == {"backward_that_does_not_compile_runs_eagerly"}
    assert "planted: the backward does not compile" in str(found)


def test_suite_reports_a_plant_that_is_not_met() -> None:
    found = failures(return_eager)
    assert found.keys() == {"calls_run_compiled_code", MIDWAY, *FALLBACK}
    assert "0 of 3 calls in training ran compiled code" in str(found)
    assert "did not meet the failure that was planted" in str(found)


def test_suite_reports_a_hook_without_a_model() -> None:
    found = failures(lambda model: None)
    assert found.keys() == {"hook_gives_a_model"}


def test_suite_reports_too_few_batches() -> None:
    found = failures(compile_in_place, build_batches=lambda self: [{"features": torch.ones(2, 6)}])
    assert "build_batches gave 1; expected two batches of different shapes" in str(found)
