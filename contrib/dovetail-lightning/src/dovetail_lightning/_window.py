"""The open window: what its losses are multiplied by, and in the end its gradients.

Lightning back-propagates `loss / d`, with `d` its `accumulate_grad_batches`, and averages over the
ranks. A micro-batch of mean loss `l` over `n` items is therefore handed over as `l * n / w`, with a
reference weight `w`, and the gradients are multiplied once by `d * num_ranks * w / sum(n)`, the sum
running over window and ranks. That makes them those of `sum(n * l) / sum(n)`, the large batch's,
whatever the lengths and however few micro-batches the window has; nothing is read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dovetail import WindowResult
from dovetail.run.distributed import Ranks


class Window:
    """Losses and items of the micro-batches since the last optimizer step.

    Args:
        ranks: The processes that average their gradients.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._losses: list[Tensor] = []
        self._items: list[float | Tensor] = []
        self._reference: float | Tensor | None = None

    def add(self, loss: Tensor, items: int | float | Tensor) -> Tensor:
        """Return what to hand over for a micro-batch.

        Args:
            loss: Its mean loss, shape `()`.
            items: What the mean runs over; 0 for a batch that does not count.
        """
        if isinstance(items, Tensor):
            # Counts are often int64, whose quotient would be float32 whatever the loss is.
            dtype = torch.float64 if loss.dtype is torch.float64 else torch.float32
            items = items.detach().to(loss.device, dtype)
        if self._reference is None:
            self._reference = self._choose_reference(items, loss)
        self._losses.append(loss.detach())
        self._items.append(items)
        if self._ranks.size == 1 and not isinstance(items, Tensor) and not items:
            # The mean of nothing is often 0/0, whose backward is NaN whatever it is multiplied by.
            return torch.zeros_like(loss, requires_grad=True)
        share = items / self._reference
        if isinstance(share, Tensor):
            return loss * share.to(loss.dtype)
        return loss if share == 1 else loss * share

    def close(self, optimizer: Optimizer, divisor: int, max_norm: float | None) -> WindowResult:
        """Make the optimizer's gradients those of the large batch, clipped; begin a new window.

        Gradients that are not finite, or of no item at all, are taken away: without them the step
        of an optimizer does nothing.

        Args:
            optimizer: Its gradients are the mean over the ranks.
            divisor: What the host has divided each loss by.
            max_norm: L2 norm to clip to; `None` does not clip.
        """
        gradients = _gradients_of(optimizer)
        count = len(self._losses)
        loss, items, norm = self._measure(gradients, divisor)
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if items and is_finite:
            # Source: torch.nn.utils.clip_grad_norm_, with its 1e-6.
            clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
            factor = self._factor(items, divisor) * clip
            if factor != 1 and gradients:
                torch._foreach_mul_(gradients, factor)
        else:
            optimizer.zero_grad(set_to_none=True)
        self.clear()
        mean = loss / items if items else math.nan
        return WindowResult(mean, items, norm, count, bool(items) and not is_finite)

    def clear(self) -> None:
        """Begin a new window."""
        if self._ranks.size == 1:
            self._reference = None
        self._losses.clear()
        self._items.clear()

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an open window with its gradients; nothing where none is open.

        Of several ranks each has another part of it, and a checkpoint has room for one: theirs
        ends where the checkpoint is, and what follows is a window of its own.
        """
        if not self._losses or self._ranks.size > 1:
            return {}
        gradients = enumerate(parameter.grad for parameter in _parameters_of(optimizer))
        return {
            "losses": list(self._losses),
            "items": list(self._items),
            "reference": self._reference,
            "gradients": {str(i): grad.clone() for i, grad in gradients if grad is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Open the window that `state_dict` returned, if it did."""
        if not state or self._ranks.size > 1:
            return
        parameters = _parameters_of(optimizer)
        device = parameters[0].device
        self._losses = [loss.to(device) for loss in state["losses"]]
        self._items = [_move(items, device) for items in state["items"]]
        self._reference = _move(state["reference"], device)
        for index, gradient in state["gradients"].items():
            parameters[int(index)].grad = gradient.to(device)

    def _measure(self, gradients: list[Tensor], divisor: int) -> tuple[float, float, float]:
        """Return sum of losses, items and the norm of the step's gradient, of all ranks."""
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        sizes = [size for size in self._items if isinstance(size, Tensor)]
        reference = [self._reference] if isinstance(self._reference, Tensor) else []
        values = iter(_to_host([norm, *self._losses, *sizes, *reference]))
        host_norm = next(values)
        losses = [next(values) for _ in self._losses]
        items = [next(values) if isinstance(size, Tensor) else size for size in self._items]
        if reference:
            self._reference = next(values)
        # Where there are no items the mean may be NaN, and NaN times 0 is NaN.
        total = sum(n * mean for n, mean in zip(items, losses, strict=True) if n)
        is_bad = not (math.isfinite(total) and math.isfinite(host_norm))
        total, num_items, num_bad = self._ranks.add_up([total, float(sum(items)), float(is_bad)])
        norm_of_step = host_norm * self._factor(num_items, divisor) if num_items else host_norm
        return total, num_items, math.nan if num_bad and math.isfinite(total) else norm_of_step

    def _factor(self, items: float, divisor: int) -> float:
        assert isinstance(self._reference, float | int)  # `_measure` has read it from the device
        return divisor * self._ranks.size * self._reference / items

    def _choose_reference(self, items: Any, loss: Tensor) -> float | Tensor:
        if self._ranks.size > 1:
            # Once a run; any weight is right if it is one for all ranks.
            return self._ranks.add_up([float(items)])[0] / self._ranks.size or 1.0
        if isinstance(items, Tensor):
            return items.clamp(min=1)
        return float(items or 1)


def _parameters_of(optimizer: Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that exist, dense; of a sparse one the values, each index once."""
    gradients = []
    for parameter in _parameters_of(optimizer):
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients


def _to_host(tensors: list[Tensor]) -> list[float]:
    """Read scalars from their device, in one transfer."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is None:
        return [tensor.item() for tensor in tensors]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values: list[float] = torch.stack([t.to(device, dtype) for t in tensors]).tolist()
    return values
