"""How the compiler suite tells compiled calls from others, and how it makes compiling fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor, nn

Stage: TypeAlias = Literal["forward", "backward", "second graph"]
"""What of a model does not compile: its forward, its backward alone, or what follows a break."""

Batch: TypeAlias = Mapping[str, Tensor]


class SmallClassifier(nn.Module):
    """Two layers with a batch norm between them, so that training and evaluation differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(batch, 3)` of features `(batch, 6)`."""
        logits: Tensor = self.last(torch.tanh(self.norm(self.first(features))))
        return logits


class PartedClassifier(nn.Module):
    """Two graphs, the first of which draws random numbers and changes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.last = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(batch, 3)` of features `(batch, 6)`."""
        values = self.first(features)
        torch._dynamo.graph_break()
        logits: Tensor = self.last(values)
        return logits


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of a model's output: a tensor, a mapping or a sequence."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


class PythonCalls:
    """Counts how often the layers of a model run in Python.

    A hook on every layer counts its calls. A compiler takes the hook's test of
    `torch.compiler.is_compiling` for true and leaves the counting out of what it compiles, so that
    compiled code counts nothing, however it was made.

    Args:
        model: The model, before it is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        layers = [m for m in model.modules() if not any(True for _ in m.children())]
        self._handles = [layer.register_forward_pre_hook(self._count) for layer in layers]

    def _count(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._add()

    def _add(self) -> None:
        self.count += 1

    def of(self, call: Callable[[], object]) -> int:
        """Return how often layers ran in Python in one call."""
        before = self.count
        call()
        return self.count - before

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


@dataclass
class Plant:
    """A failure that was planted in compiling."""

    stage: Stage
    is_reached: bool = False

    @property
    def message(self) -> str:
        """What the failure says."""
        return f"planted: the {self.stage} does not compile"

    def fail(self) -> Any:
        """Raise the failure."""
        self.is_reached = True
        raise RuntimeError(self.message)


@contextmanager
def plant_in_dynamo(stage: Stage) -> Iterator[Plant]:
    """Give every `torch.compile` inside a backend that fails at a stage.

    `nn.Module.compile` calls `torch.compile` too. As with a real backend, the backward's failure
    comes when torch compiles it, which may be as late as in the first backward.

    Args:
        stage: Whether the forward's graph does not compile, the backward's only, or only the graph
            after the first.

    Yields:
        Tells whether the failure was met.
    """
    plant = Plant(stage)
    original: Any = torch.compile
    backend = _failing_backend(plant)

    def compile_with_plant(*args: Any, **kwargs: Any) -> Any:
        settings = {k: v for k, v in kwargs.items() if k not in ("mode", "options")}
        return original(*args, **{**settings, "backend": backend})

    with mock.patch.object(torch, "compile", compile_with_plant):
        yield plant


def _failing_backend(plant: Plant) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]  # no py.typed
    from torch._dynamo.backends.common import aot_autograd

    def refuse(graph: Any, inputs: Any) -> Any:
        plant.fail()

    graphs: list[Any] = []

    def refuse_the_second(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward if len(graphs) == 1 else plant.fail()

    def run_eagerly(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    if plant.stage != "backward":
        return refuse if plant.stage == "forward" else refuse_the_second
    # The documented way to a backend of one's own with a backward:
    # https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html
    backend: Callable[..., Any] = aot_autograd(fw_compiler=run_eagerly, bw_compiler=refuse)
    return backend
