"""Conformance of the compile hook: faster, and otherwise the same model."""

from __future__ import annotations

import copy

import torch

from dovetail.testing.batches import find_difference, is_equal, raise_unless
from dovetail.testing.compiler.comparing import LEARNING_RATE, NUM_CALLS, ComparingSuite, quiet
from dovetail.testing.compiler.compiling import PartedClassifier, PythonCalls, tensors_in
from dovetail.testing.suite import reported_by, seeded


class CompilerSuite(ComparingSuite):
    """Checks of a compiler, on a small classifier or on a model of the author's."""

    def test_hook_gives_a_model(self) -> None:
        """The hook answers with a module."""
        with quiet():
            self.build(self._model())

    def test_class_and_keys_are_kept(self) -> None:
        """The model stays an instance of its class, and its `state_dict` keeps its keys."""
        pair = self._pair()
        is_kept = isinstance(pair.compiled, type(pair.eager))
        found = f"the compiled model is a {type(pair.compiled).__name__}"
        expected = f"an instance of {type(pair.eager).__name__}"
        hint = "Compile in place: model.compile(...)."
        raise_unless(is_kept, self.where, found, expected, hint)
        with quiet():
            pair.compiled(**self._batches()[0])
        keys, own = list(pair.compiled.state_dict()), list(pair.eager.state_dict())
        found = f"the keys of state_dict became {keys[:3]}…"
        raise_unless(keys == own, self.where, found, f"{own[:3]}…", hint)

    def test_parameters_are_the_same_objects(self) -> None:
        """An optimizer that was made before compiling sees the parameters that are trained."""
        pair = self._pair()
        after = {id(parameter) for parameter in pair.compiled.parameters()}
        found = "the compiled model has other parameters than the model that was given"
        hint = "A run makes the optimizer first; it would step weights that nobody uses."
        is_same = after == {id(parameter) for parameter in pair.given}
        raise_unless(is_same, self.where, found, "the same objects", hint)

    def test_outputs_and_gradients_agree(self) -> None:
        """Forward and gradients agree with eager execution."""
        pair, batch = self._pair(), self._batches()[0]
        self._check_step(pair, batch, "training")

    def test_second_shape_works(self) -> None:
        """A batch of another shape agrees too, and so does the first shape after it."""
        pair, (first, second, *_) = self._pair(), self._batches()
        with reported_by("test_outputs_and_gradients_agree"):
            self._check_step(pair, first, "training")
        self._check_step(pair, second, "a second shape")
        self._check_step(pair, first, "the first shape again")

    def test_eval_mode_agrees(self) -> None:
        """Evaluation without gradients agrees, and training goes on after it."""
        pair, batch = self._pair(), self._batches()[0]
        with reported_by("test_outputs_and_gradients_agree"):
            self._check_step(pair, batch, "training")
        pair.eager.eval()
        pair.compiled.eval()
        with torch.no_grad():
            self._check_outputs(pair, batch, "evaluation")
        pair.eager.train()
        pair.compiled.train()
        self._check_step(pair, batch, "training after an evaluation")

    def test_calls_run_compiled_code(self) -> None:
        """Every call with a shape that was seen runs compiled code, in training and evaluation."""
        model = self._model()
        calls = PythonCalls(model)
        with reported_by("test_hook_gives_a_model"), quiet():
            compiled = self.build(model)
        for mode in (True, False):
            compiled.train(mode)
            for batch in self._batches():
                with quiet(), torch.set_grad_enabled(mode):
                    compiled(**batch)
                    count = self.count_compiled_calls(compiled, calls, batch)
                name = "training" if mode else "evaluation"
                found = f"{count} of {NUM_CALLS} calls in {name} ran compiled code"
                hint = "The others ran the layers in Python, as an eager model does."
                raise_unless(count == NUM_CALLS, self.where, found, "all of them", hint)

    def test_training_continues(self) -> None:
        """Several optimizer steps agree with eager execution."""
        with reported_by("test_parameters_are_the_same_objects"):
            self.test_parameters_are_the_same_objects()
        pair, batches = self._pair(), self._batches()
        optimizers = [
            torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
            for model in (pair.eager, pair.compiled)
        ]
        with reported_by("test_outputs_and_gradients_agree"):
            self._check_step(pair, batches[0], "training")
        for step in range(3):
            self._check_step(pair, batches[0], f"step {step}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        weights = (dict(pair.eager.state_dict()), dict(pair.compiled.state_dict()))
        for (name, left), right in zip(weights[0].items(), weights[1].values(), strict=True):
            self._check_close(right, left, f"{name} after three steps")

    def test_saved_weights_load_into_the_model(self) -> None:
        """The weights of the compiled model load into one that is not compiled."""
        with reported_by("test_class_and_keys_are_kept"):
            self.test_class_and_keys_are_kept()
        with reported_by("test_eval_mode_agrees"):
            self.test_eval_mode_agrees()
        pair, batch = self._pair(), self._batches()[0]
        with quiet():
            self.compute_loss(pair.compiled(**batch)).backward()  # type: ignore[no-untyped-call, unused-ignore]
        with torch.no_grad():
            for parameter in pair.compiled.parameters():
                parameter.add_(0.5)
        fresh = self._model()
        state = {key: value.clone() for key, value in pair.compiled.state_dict().items()}
        fresh.load_state_dict(state)
        difference = find_difference(state, fresh.state_dict())
        found = f"saved and loaded weights differ: {difference}"
        raise_unless(difference is None, self.where, found, "the weights that were trained")
        with torch.no_grad(), quiet():
            left = list(tensors_in(fresh.eval()(**batch)))
            right = list(tensors_in(pair.compiled.eval()(**batch)))
        for expected, output in zip(left, right, strict=True):
            self._check_close(output, expected, "the output with weights that were changed")

    def test_forward_that_does_not_compile_runs_eagerly(self) -> None:
        """A forward that does not compile is run eagerly, with a warning."""
        self._check_fallback("forward")

    def test_backward_that_does_not_compile_runs_eagerly(self) -> None:
        """A model whose backward does not compile is trained eagerly, with a warning."""
        self._check_fallback("backward")

    def test_failure_in_mid_call_leaves_no_trace(self) -> None:
        """A call that fails when it has drawn and counted already is run again from its start."""
        batch = torch.linspace(-1, 1, 30).reshape(5, 6)
        with seeded(11):
            eager = PartedClassifier().train()
        model = copy.deepcopy(eager)
        reported = reported_by("test_forward_that_does_not_compile_runs_eagerly")
        with self.plant_failure("second graph") as plant, quiet(), reported:
            compiled = self.build(model)
            with seeded(5):
                output, draw = compiled(batch), torch.rand(1)
        self._check_reached(plant)
        with seeded(5):
            expected, next_draw = eager(batch), torch.rand(1)
        hint = "Save random generators and buffers before a call that may compile."
        found = "after a call that failed midway, its output is another"
        is_same = is_equal(output, expected)
        raise_unless(is_same, self.where, found, "that of eager execution", hint)
        difference = find_difference(eager.state_dict(), compiled.state_dict())
        found = f"after a call that failed midway, buffers differ: {difference}"
        raise_unless(difference is None, self.where, found, "those of eager execution", hint)
        found = "after a call that failed midway, what is drawn next is another"
        raise_unless(is_equal(draw, next_draw), self.where, found, "what follows one call", hint)
