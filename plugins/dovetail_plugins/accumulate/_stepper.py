"""The end of a window: from its gradients to the optimizer step, or to none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.distributed as dist

from dovetail.types import WindowResult
from dovetail_plugins.accumulate._gradients import gradients_of, scale, total_norm

if TYPE_CHECKING:
    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from dovetail_plugins.accumulate._window import Window


class Stepper:
    """Scales, clips and applies the gradients of an optimizer, if they are finite.

    Args:
        optimizer: Owner of the parameters.
        scaler: Gradient scaler of an fp16 run.
        max_norm: L2 norm to clip to; `None` does not clip.
        num_ranks: Processes that step together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        max_norm: float | None,
        num_ranks: int,
    ) -> None:
        self._optimizer = optimizer
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._max_norm = max_norm
        self._num_ranks = num_ranks

    def scale(self, loss: Tensor) -> Tensor:
        """Return what to run backward from."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def close(self, window: Window) -> WindowResult:
        """Take the step of `window`, unless it is empty or not finite, and drop its gradients.

        Args:
            window: An open window, whose gradients are the mean over the ranks; it is cleared.

        Returns:
            What became of the window. Loss and items are those of all ranks; the loss is NaN, and
            nothing is skipped, if there were no items.
        """
        scaler = self._scaler if window.has_gradients else None
        if scaler is not None:
            scaler.unscale_(self._optimizer)
            self._share_overflow(scaler)
        gradients = gradients_of(self._optimizer)
        sums = window.measure(total_norm(gradients))
        norm = sums.norm * sums.factor
        is_finite = sums.is_finite and math.isfinite(norm)
        loss = sums.loss / sums.items if sums.items else math.nan
        is_skipped = sums.items != 0 and not is_finite
        result = WindowResult(loss, sums.items, norm, window.count, is_skipped)
        if is_finite and sums.items:
            self._step(gradients, sums.factor, norm)
        if scaler is not None:
            # After a skipped window too: this is where the scale backs off.
            scaler.update()
        self.drop(window)
        return result

    def drop(self, window: Window) -> None:
        """Drop the gradients and begin a new window."""
        self._optimizer.zero_grad(set_to_none=True)
        window.clear()

    def _step(self, gradients: list[Tensor], factor: float, norm: float) -> None:
        if self._max_norm is not None:
            # Source: torch.nn.utils.clip_grad_norm_, with its 1e-6.
            factor *= min(1.0, self._max_norm / (norm + 1e-6))
        if factor != 1 and gradients:
            scale(gradients, factor)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)

    def _share_overflow(self, scaler: GradScaler) -> None:
        """Let every rank know that one overflowed: all skip the step and lower the scale."""
        if self._num_ranks > 1:
            # Source: torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler.
            for found in scaler._found_inf_per_device(self._optimizer).values():
                dist.all_reduce(found, dist.ReduceOp.MAX)
