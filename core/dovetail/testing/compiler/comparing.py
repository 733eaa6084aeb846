"""How the compiler suite builds a model twice and holds the compiled one against the eager one."""

from __future__ import annotations

import unittest
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import build_message
from dovetail.testing.batches import is_equal, raise_unless
from dovetail.testing.compiler.compiling import (
    Batch,
    Plant,
    PythonCalls,
    SmallClassifier,
    Stage,
    plant_in_dynamo,
    tensors_in,
)
from dovetail.testing.suite import ConformanceError, Suite, reported_by, seeded

NUM_CALLS = 3
LEARNING_RATE = 0.1


@dataclass
class Pair:
    """A model and its compiled form, from the same weights."""

    eager: nn.Module
    compiled: nn.Module
    given: Sequence[nn.Parameter]
    """Parameters of the model that the hook was given, from before the call."""


class ComparingSuite(Suite):
    """What the checks of a compiler are made of: its model, and the two forms of it."""

    hook = "compile"
    rtol: float = 1e-4
    """Relative tolerance of outputs and gradients."""
    atol: float = 1e-5
    """Absolute tolerance of outputs and gradients."""
    uses_dynamo: bool = True
    """Whether it compiles through `torch.compile` or `nn.Module.compile`. The suite then knows how
    to make compiling fail; otherwise override `plant_failure`."""

    def build_model(self) -> nn.Module:
        """Return a model with layers inside, and without dropout: compiled code draws otherwise."""
        return SmallClassifier()

    def build_batches(self) -> Sequence[Batch]:
        """Return two batches of different shapes; `model(**batch)` takes each."""
        generator = torch.Generator().manual_seed(3)
        return [{"features": torch.randn(size, 6, generator=generator)} for size in (5, 9)]

    def compute_loss(self, outputs: Any) -> Tensor:
        """Return a scalar of the model's outputs to back-propagate."""
        losses = [tensor.square().mean() for tensor in tensors_in(outputs)]
        return torch.stack(losses).sum()

    def count_compiled_calls(self, model: nn.Module, calls: PythonCalls, batch: Batch) -> int:
        """Call a compiled model several times; return how many calls ran compiled code.

        As it stands, a call counts if fewer layers of the model ran in Python than an eager call
        runs, which holds for whatever turns Python into something else. Override it for a compiler
        that keeps the model's Python, and count what tells that it was at work.

        Args:
            model: The compiled model, which has been called with `batch` once.
            calls: Counts the layers that run in Python, hooked before the model was compiled.
            batch: What to call it with.
        """
        eager = self.build_model()
        num_layers = PythonCalls(eager).of(lambda: eager(**batch))
        found = [calls.of(lambda: model(**batch)) for _ in range(NUM_CALLS)]
        return sum(count < num_layers for count in found)

    @contextmanager
    def plant_failure(self, stage: Stage) -> Iterator[Plant]:
        """Make compiling fail inside: the forward's, the backward's alone, or a second graph's.

        Raises:
            unittest.SkipTest: The suite knows no way to.
        """
        if not self.uses_dynamo:
            raise unittest.SkipTest("override plant_failure to have the fallback checked")
        with plant_in_dynamo(stage) as plant:
            yield plant

    def build(self, model: nn.Module) -> nn.Module:
        """Compile a model as a run does."""
        registry = self.registry()
        options = self.build_options(registry)
        if self.uses_dynamo:
            torch.compiler.reset()
        return registry.compile(self.name, model, self.task, options)

    def _model(self) -> nn.Module:
        with seeded(11):
            return self.build_model().train()

    def _batches(self) -> Sequence[Batch]:
        batches = list(self.build_batches())
        found = f"build_batches gave {len(batches)}"
        where = type(self).__name__
        raise_unless(len(batches) >= 2, where, found, "two batches of different shapes")
        return batches

    def _pair(self) -> Pair:
        eager, model = self._model(), self._model()
        given = list(model.parameters())
        with reported_by("test_hook_gives_a_model"), quiet():
            return Pair(eager, self.build(model), given)

    def _check_outputs(self, pair: Pair, batch: Batch, what: str) -> tuple[Any, Any]:
        with seeded(5):
            expected = pair.eager(**batch)
        with quiet(), seeded(5):
            outputs = pair.compiled(**batch)
        left, right = list(tensors_in(expected)), list(tensors_in(outputs))
        found = f"{what} gave {len(right)} tensors"
        raise_unless(len(left) == len(right), self.where, found, f"{len(left)}, as eager execution")
        for one, other in zip(left, right, strict=True):
            self._check_close(other, one, f"the output in {what}")
        return expected, outputs

    def _check_step(self, pair: Pair, batch: Batch, what: str) -> None:
        """Compare outputs and gradients; the gradients stay."""
        for model in (pair.eager, pair.compiled):
            model.zero_grad()
        for outputs in self._check_outputs(pair, batch, what):
            with quiet():
                torch.autograd.backward(self.compute_loss(outputs))
        gradients = gradients_of(pair.compiled)
        for name, expected in gradients_of(pair.eager).items():
            found = gradients.get(name, torch.zeros_like(expected))
            self._check_close(found, expected, f"the gradient of {name} in {what}")

    def _check_close(self, found: Tensor, expected: Tensor, what: str) -> None:
        is_fine = found.shape == expected.shape and torch.allclose(
            found.double(), expected.double(), self.rtol, self.atol, equal_nan=True
        )
        error = (
            f"by {(found.double() - expected.double()).abs().max().item():.1e}"
            if found.shape == expected.shape and found.numel()
            else f"in shape, {tuple(found.shape)} and {tuple(expected.shape)}"
        )
        limit = f"rtol {self.rtol:g} and atol {self.atol:g}"
        raise_unless(is_fine, self.where, f"{what} differs from eager execution {error}", limit)

    def _check_fallback(self, stage: Stage) -> None:
        eager, model, batch = self._model(), self._model(), self._batches()[0]
        with warnings.catch_warnings(record=True) as caught, self.plant_failure(stage) as plant:
            warnings.simplefilter("always")
            with reported_by("test_hook_gives_a_model"):
                compiled = self.build(model)
            expected = self._train(eager, batch)
            try:
                losses = self._train(compiled, batch)
            except Exception as err:
                self._check_reached(plant)
                text = (str(err).splitlines() or [""])[0]
                found = f"a {stage} that does not compile raised {type(err).__name__}: {text}"
                expected_text = "eager execution and a warning"
                raise ConformanceError(build_message(self.where, found, expected_text)) from err
        self._check_reached(plant)
        is_same = all(map(is_equal, losses, expected))
        found = f"after a {stage} that does not compile the losses are {losses}"
        raise_unless(is_same, self.where, found, f"those of eager execution, {expected}")
        left, right = gradients_of(eager), gradients_of(compiled)
        names = sorted(n for n in left if not (n in right and is_equal(left[n], right[n])))
        found = f"after a {stage} that does not compile the gradients differ: {', '.join(names)}"
        raise_unless(not names, self.where, found, "those of eager execution")
        texts = [str(w.message) for w in caught]
        is_told = any(plant.message in text or "eager" in text.lower() for text in texts)
        found = f"a {stage} that does not compile passed without a word"
        expected_text = "a warning of the reason, or that the model runs eagerly"
        raise_unless(is_told, self.where, found, expected_text)

    def _check_reached(self, plant: Plant) -> None:
        found = f"it did not meet the failure that was planted in compiling the {plant.stage}"
        hint = "Override plant_failure, or set uses_dynamo if that is wrong."
        expected = "a compiler that goes through torch.compile, as uses_dynamo says"
        raise_unless(plant.is_reached, self.where, found, expected, hint)

    def _train(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Take two steps; return their losses. The second one's gradients stay."""
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            with seeded(5):
                loss = self.compute_loss(model(**batch))
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return losses


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore what a compiler warns of: what it does is looked at, not what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gradients_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return copies of the gradients there are, by parameter."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
