"""The open window: what to back-propagate, and by what its gradients are multiplied at its end.

A micro-batch of mean loss `l` over `n` items is back-propagated as `l * n / w`, with a reference
weight `w` that is known before the rest of the window is. At the end the gradients are multiplied
once by `w * num_ranks / sum(n)`, which makes them those of `sum(n * l) / sum(n)`; `num_ranks`,
because ranks average their gradients. `w` is the steps of a full window times the items of the
first micro-batch: where all are of one size, the factors are the textbook's `1 / steps` and 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.errors import DataError, build_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class WindowSums(NamedTuple):
    """A window as numbers of the host."""

    loss: float
    """Sum of items times mean loss."""
    items: float
    """Sum of items."""
    factor: float
    """What the gradients must be multiplied by to be those of `loss / items`."""
    norm: float
    """Norm of the gradients before that."""
    is_finite: bool
    """Whether the loss and the gradients of every rank are."""


class Window:
    """Losses and sizes of the micro-batches since the last optimizer step.

    Nothing is read from the device before `measure`: until then losses and tensor sizes stay
    where they are.

    Args:
        steps: Micro-batches of a full window.
        num_ranks: Processes that average their gradients.
        needs_backward: Whether a micro-batch without items is back-propagated like any other.
        items: Items of a full window, instead of micro-batches.
    """

    def __init__(
        self, steps: int, num_ranks: int, needs_backward: bool, items: int | None = None
    ) -> None:
        self.count = 0
        self.steps = steps
        self._items = items
        self._num_items = 0.0
        self._num_ranks = num_ranks
        self._needs_backward = needs_backward
        self._losses: list[Tensor] = []
        self._sizes: list[float | Tensor] = []
        self._reference: float | Tensor | None = None
        self._last_size = 1.0

    @property
    def is_full(self) -> bool:
        """Whether it has all its micro-batches, or items."""
        if self._items is None:
            return self.count >= self.steps
        # Several ranks are told by who reads ahead for them: none can know of the others here.
        return self._num_ranks == 1 and self._num_items >= self._items

    @property
    def is_next_last(self) -> bool:
        """Whether the next micro-batch is known to end it."""
        return self._items is None and self.count + 1 >= self.steps

    @property
    def has_gradients(self) -> bool:
        """Whether a micro-batch was back-propagated."""
        return bool(self._losses)

    def back_propagate(self, loss: Tensor, scaled_loss: Tensor, weight: Any) -> None:
        """Add one micro-batch.

        Args:
            loss: Its mean loss, shape `()`.
            scaled_loss: What to run backward from: `loss`, or `loss` times a gradient scale.
            weight: Items the mean runs over; a number or a tensor of shape `()`.

        Raises:
            DataError: `weight` is not a scalar, or a number that is negative or not finite.
        """
        size = _as_size(weight, loss)
        if self._items is not None:
            self._num_items += _on_host(size)
        # The mean of nothing is often 0/0, whose backward is NaN whatever it starts from.
        if self._needs_backward or isinstance(size, Tensor) or size > 0:
            is_plain = self.steps == 1 and self._num_ranks == 1 and self._items is None
            seed = None if is_plain else self._seed(size, scaled_loss)
            scaled_loss.backward(seed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._losses.append(loss.detach())
            self._sizes.append(size)
        self.count += 1

    def measure(self, norm: Tensor) -> WindowSums:
        """Read the window from the device, in one transfer, and sum it over the ranks.

        Args:
            norm: Norm of the gradients as they are, shape `()`.

        Raises:
            DataError: A weight that was given as a tensor is negative.
        """
        tensors = [norm, *self._losses, *(s for s in self._sizes if isinstance(s, Tensor))]
        if isinstance(self._reference, Tensor):
            tensors.append(self._reference)
        values = iter(_to_host(tensors))
        host_norm = next(values)
        losses = [next(values) for _ in self._losses]
        sizes = [next(values) if isinstance(size, Tensor) else size for size in self._sizes]
        reference = next(values) if isinstance(self._reference, Tensor) else self._reference
        if min(sizes, default=0) < 0:
            raise _weight_error(repr(min(sizes)))
        items = sum(sizes)
        # Where there are no items the mean may be NaN, and NaN times 0 is NaN.
        loss = sum(size * mean for size, mean in zip(sizes, losses, strict=True) if size != 0)
        is_finite = math.isfinite(loss) and math.isfinite(host_norm)
        if self._num_ranks > 1:
            device = self._losses[0].device if self._losses else norm.device
            sums = torch.tensor(
                [loss, items, 0 if is_finite else 1], dtype=torch.float64, device=device
            )
            dist.all_reduce(sums)
            loss, items, num_bad = sums.tolist()
            is_finite = num_bad == 0
        if reference is None or items == 0:
            return WindowSums(loss, items, 1.0, host_norm, is_finite)
        self._last_size = reference / self.steps
        factor = reference * self._num_ranks / items
        return WindowSums(loss, items, factor, host_norm, is_finite)

    def clear(self) -> None:
        """Begin a new window."""
        if self._num_ranks == 1:
            self._reference = None
        self._losses.clear()
        self._sizes.clear()
        self._num_items = 0.0
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the window as tensors and numbers."""
        state: dict[str, Any] = {
            "count": self.count,
            "losses": list(self._losses),
            "sizes": list(self._sizes),
            "last_size": self._last_size,
        }
        if self._reference is not None:
            state["reference"] = self._reference
        return state

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned, with its tensors on `device`."""
        self.clear()
        self.count = state["count"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        self._sizes = [_move(size, device) for size in state["sizes"]]
        if self._items is not None:
            self._num_items = sum(map(_on_host, self._sizes))
        self._last_size = state["last_size"]
        # Several ranks agree on it once a run: to the bit, it must be the same after a resume.
        self._reference = _move(state.get("reference"), device)

    def _seed(self, size: float | Tensor, loss: Tensor) -> Tensor | None:
        """Return the gradient that backward starts from, `size / reference`; `None` is 1."""
        if self._reference is None:
            self._reference = self._choose_reference(size, loss.device)
        share = size / self._reference
        if isinstance(share, Tensor):
            return share.to(loss.dtype)
        return torch.full((), share, dtype=loss.dtype, device=loss.device) if share != 1 else None

    def _choose_reference(self, size: float | Tensor, device: torch.device) -> float | Tensor:
        if self._items is not None:
            return float(self._items)
        if self._num_ranks > 1:
            # Once a run; any weight is right if it is one for all ranks.
            largest = torch.as_tensor(size, dtype=torch.float64, device=device).clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            return self.steps * (largest.item() or 1.0)
        if isinstance(size, Tensor):
            return self.steps * torch.where(size > 0, size, self._last_size)
        return self.steps * (size or self._last_size)


def check_loss(loss: object) -> None:
    """Raise `DataError` unless `loss` is a tensor of shape `()` with a graph."""
    if isinstance(loss, Tensor):
        if loss.dim() == 0 and loss.requires_grad:
            return
        found = f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
    else:
        found = f"{loss!r} of type {type(loss).__name__}"
    raise DataError(
        build_message(
            "accumulate: loss",
            found,
            "a tensor of shape () with a graph to back-propagate through",
            "Pass the mean loss of the micro-batch.",
        )
    )


def _as_size(weight: Any, loss: Tensor) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.dim() == 0:
            # Counts are often int64, whose quotient would be float32 whatever the loss is.
            dtype = torch.float64 if loss.dtype is torch.float64 else torch.float32
            return weight.detach().to(device=loss.device, dtype=dtype)
        found = f"a tensor of shape {tuple(weight.shape)}"
    else:
        try:
            if 0 <= (size := float(weight)) < math.inf:
                return size
        except (TypeError, ValueError):
            pass
        found = repr(weight)
    raise _weight_error(found)


def _on_host(size: float | Tensor) -> float:
    if isinstance(size, Tensor):
        raise DataError(
            build_message(
                "accumulate: weight",
                f"a tensor on {size.device}, where tokens_per_step counts the items",
                "a number, which is there before the device is",
                "Count the items before the batch goes to the device.",
            )
        )
    return size


def _weight_error(found: str) -> DataError:
    return DataError(
        build_message(
            "accumulate: weight",
            found,
            "a number >= 0 or a tensor of shape (), the items the loss is a mean of",
            "Pass the number of samples, or of target tokens that are not ignored.",
        )
    )


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _to_host(tensors: Sequence[Tensor]) -> list[float]:
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is None:
        return [tensor.item() for tensor in tensors]
    values: list[float] = torch.stack([tensor.to(device) for tensor in tensors]).tolist()
    return values
