"""Micro-batches for an accumulator, and the large batches that they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dovetail.types import Accumulator

WeightKind: TypeAlias = Literal["number", "tensor"]

_INPUTS, _OUTPUTS = 3, 2
_SHARE_OF_NORM = 0.1  # of the clipping norm, so that gradients stay well below it
_LEARNING_RATE = 0.5


@dataclass
class MicroBatch:
    """Items of one micro-batch, `(items, 3)` to `(items, 2)`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def make_micro_batches(sizes: Sequence[int], dtype: torch.dtype) -> list[MicroBatch]:
    """Return micro-batches of the given numbers of items, all different."""
    generator = torch.Generator().manual_seed(17)
    total = sum(sizes)
    x = torch.rand(total, _INPUTS, generator=generator, dtype=torch.float64) * 2 - 1
    y = torch.rand(total, _OUTPUTS, generator=generator, dtype=torch.float64) * 2 - 1
    pairs = zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True)
    return [MicroBatch(a.to(dtype), b.to(dtype)) for a, b in pairs]


def concatenate(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Return the one large batch of several."""
    return MicroBatch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))


def split_windows(batches: Sequence[MicroBatch], steps: int) -> list[list[MicroBatch]]:
    """Return the windows of `steps` micro-batches, the last one maybe shorter."""
    return [list(batches[start : start + steps]) for start in range(0, len(batches), steps)]


def build_linear(dtype: torch.dtype) -> nn.Module:
    """Return a small model whose weights are zero, so that no rounding hides a gradient."""
    model = nn.Linear(_INPUTS, _OUTPUTS, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def weights_of(model: nn.Module) -> Tensor:
    """Return copies of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    difference, norm = float((found - expected).norm()), float(expected.norm())
    return difference / norm if norm else difference


@dataclass
class Trainee:
    """A model that trains by an accumulator, or by large batches where there is none."""

    max_grad_norm: float | None
    dtype: torch.dtype = torch.float32
    factor: float = 1.0
    """Of the loss, over what keeps its gradient below the clipping norm."""
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    accumulator: Accumulator = field(init=False)

    def __post_init__(self) -> None:
        self.model = build_linear(self.dtype)
        self.optimizer = self.build_optimizer()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer whose state matters to its steps."""
        return torch.optim.SGD(self.model.parameters(), lr=_LEARNING_RATE, momentum=0.5)

    def loss(self, batch: MicroBatch) -> Tensor:
        """Return the mean loss of a batch, shape `()`."""
        scale = self.factor * _SHARE_OF_NORM * (self.max_grad_norm or 1.0)
        return scale * (torch.tanh(self.model(batch.x)) - batch.y).square().sum(1).mean()

    def feed(
        self,
        batch: MicroBatch,
        is_final: bool = False,
        kind: WeightKind = "number",
        spoil: Callable[[Tensor], Tensor] | None = None,
    ) -> bool:
        """Give the accumulator one micro-batch, as the loop does.

        Args:
            batch: The micro-batch.
            is_final: Whether it ends its window.
            kind: Whether its items are told as a number or as a tensor of shape `()`.
            spoil: What is done to its loss.
        """
        weight: Any = torch.tensor(len(batch)) if kind == "tensor" else len(batch)
        with self.accumulator.micro_batch(is_final):
            loss = self.loss(batch)
            loss = loss if spoil is None else spoil(loss)
            return self.accumulator.accumulate(loss, self.model, weight, is_final)

    def step_large(self, window: Sequence[MicroBatch]) -> tuple[float, float]:
        """Take the step of a window's one large batch; return its loss and gradient norm."""
        self.optimizer.zero_grad()
        loss = self.loss(concatenate(window))
        torch.autograd.backward(loss)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        return loss.item(), norm.item()

    def state(self) -> list[Any]:
        """Return the states of model, optimizer and accumulator."""
        parts: tuple[Any, ...] = (self.model, self.optimizer, self.accumulator)
        return [part.state_dict() for part in parts]

    def load_state(self, states: Sequence[Any]) -> None:
        """Restore what `state` returned."""
        parts: tuple[Any, ...] = (self.model, self.optimizer, self.accumulator)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)

    @property
    def weights(self) -> Tensor:
        """All parameters as one vector, copied."""
        return weights_of(self.model)
