"""What an unknown loop does with a loss, seen from inside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail_plugins.accumulate.hosts import Host, check_conflict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class LoopProbe:
    """Watches the losses of a training step and the steps of an optimizer.

    It asks no framework what it would do, but sees what it does: by what the loss is multiplied
    before its backward, and how many backward passes come before a step.

    Args:
        optimizer: The optimizer of the loop.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._num_backwards = 0
        self._factor: Tensor | None = None
        self._steps: int | None = None
        self._hook = optimizer.register_step_post_hook(self._on_step)

    @property
    def steps(self) -> int | None:
        """Backward passes of the first optimizer step; `None` before it."""
        return self._steps

    @property
    def factor(self) -> float | None:
        """By what the first loss was multiplied, a gradient scale included; `None` before that.

        It is read from the device here.
        """
        return None if self._factor is None else float(self._factor)

    @property
    def is_accumulating(self) -> bool:
        """Whether the loop made several backward passes for its first step."""
        return self._steps is not None and self._steps > 1

    def watch(self, loss: Tensor) -> Tensor:
        """Return `loss`, to be given to the loop; its backward will be noticed.

        Args:
            loss: The loss of a micro-batch, shape `()`, before the loop has changed it.
        """
        if self._steps is None:
            loss.register_hook(self._on_backward)  # type: ignore[no-untyped-call]  # of torch
        return loss

    def check(self, accumulation_steps: int) -> None:
        """Raise `AccumulationConflictError` if the loop accumulates, and somebody else would."""
        host = Host("training loop", "backward passes per step", self._steps or 1, None)
        check_conflict(host, accumulation_steps)

    def _on_backward(self, gradient: Tensor) -> None:
        if self._factor is None:
            self._factor = gradient.detach().clone()
        self._num_backwards += 1

    def _on_step(self, *_: Any) -> None:
        # A step before the first loss, as some loops take to make the optimizer's state, is none.
        if self._num_backwards:
            self._steps = self._num_backwards
            self._hook.remove()
