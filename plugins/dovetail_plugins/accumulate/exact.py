"""Gradient accumulation whose step equals that of the one large batch, whatever the lengths."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, build_message
from dovetail.types import AccumulationStats, WindowResult
from dovetail_plugins.accumulate._gradients import copy_gradients, restore_gradients
from dovetail_plugins.accumulate._stepper import Stepper
from dovetail_plugins.accumulate._window import Window, check_loss
from dovetail_plugins.accumulate.hosts import is_left_to_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

__all__ = ["GradientAccumulator", "Options", "WindowResult", "dovetail_accumulate"]

dovetail_api = 1

_SYNCHRONISED: AbstractContextManager[Any] = nullcontext()


class Options(PluginOptions):
    """Options of `[accumulate.exact]`."""

    steps: Annotated[int, Field(strict=True, ge=1)] = 1
    """Micro-batches per optimizer step."""
    max_grad_norm: PositiveFloat | Literal["off"] = 1.0
    """L2 norm that a step's gradient is clipped to; "off" leaves it as it is."""


@hookimpl
def dovetail_accumulate(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, options: Options
) -> GradientAccumulator:
    """Make the accumulator of a run."""
    return GradientAccumulator(
        optimizer,
        accumulation_steps=options.steps,
        max_grad_norm=None if options.max_grad_norm == "off" else options.max_grad_norm,
        scaler=scaler,
        model=model,
    )


class GradientAccumulator:
    """Owns backward, clipping, the optimizer step and zeroing the gradients.

    A step's gradient is that of `sum(n_i * l_i) / sum(n_i)` over the micro-batches of the window
    and all ranks. It reaches the weights only if it and the loss are finite; otherwise the window
    is dropped and counted in `skipped_windows`. A window of weight 0 takes no step. A micro-batch
    ends its window if it is the `accumulation_steps`-th or the final one.

    If torch.distributed has several ranks when the accumulator is made, their gradients must be
    averaged, as `DistributedDataParallel` and `fully_shard` do, and all ranks must end their
    windows together. No micro-batch waits for the device except one that ends a window, and the
    very first of several ranks.

    Args:
        optimizer: Steps the parameters whose gradients are clipped.
        accumulation_steps: Micro-batches per optimizer step.
        max_grad_norm: L2 norm to clip to; `None` does not clip.
        scaler: Gradient scaler of an fp16 run. Its state is saved and restored by its owner.
        batch_size: Samples per micro-batch, for `effective_batch_size`.
        trainer: The Lightning trainer this runs under, if any. If that accumulates and
            `accumulation_steps` is 1, everything is left to it. Any other object is ignored.
        model: A `DistributedDataParallel` model whose synchronisation `micro_batch` controls.

    Raises:
        ConfigError: A number is out of range.
        AccumulationConflictError: The trainer accumulates too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = 1.0,
        scaler: GradScaler | None = None,
        batch_size: int = 1,
        trainer: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        counts = {"accumulation_steps": accumulation_steps, "batch_size": batch_size}
        _check_arguments(counts, max_grad_norm)
        self._host = trainer if is_left_to_trainer(trainer, accumulation_steps) else None
        self._optimizer = optimizer
        self._steps = accumulation_steps
        self._stepper = Stepper(optimizer, scaler, max_grad_norm)
        self._batch_size = batch_size
        is_distributed = dist.is_available() and dist.is_initialized()
        self._window = Window(accumulation_steps, dist.get_world_size() if is_distributed else 1)
        self._no_sync: Callable[[], AbstractContextManager[Any]] | None
        self._no_sync = getattr(model, "no_sync", None)
        self._has_unsynchronised = False
        self._total_steps = 0
        self._optimizer_steps = 0
        self._last_grad_norm: float | None = None
        self._last_window: WindowResult | None = None
        self.skipped_windows = 0
        """Windows dropped because their loss or gradient was not finite."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in a full window."""
        return self._steps

    @property
    def effective_step(self) -> int:
        """Optimizer steps taken; those of the trainer where it accumulates."""
        return self._optimizer_steps if self._host is None else int(self._host.global_step)

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step and rank: micro-batch size times accumulation steps."""
        return self._batch_size * self._steps

    @property
    def is_lightning_managed(self) -> bool:
        """Whether a Lightning trainer accumulates and steps, and this object does nothing."""
        return self._host is not None

    @property
    def is_window_open(self) -> bool:
        """Whether micro-batches are waiting for their optimizer step."""
        return self._window.count > 0

    @property
    def last_window(self) -> WindowResult | None:
        """The window closed last, `None` before the first."""
        return self._last_window

    @property
    def last_window_skipped(self) -> bool:
        """Whether the window closed last was dropped because something was not finite."""
        return self._last_window is not None and self._last_window.is_skipped

    @property
    def last_grad_norm(self) -> float | None:
        """Gradient norm of the last optimizer step, before clipping."""
        return self._last_grad_norm

    @property
    def stats(self) -> AccumulationStats:
        """Counts and the last gradient norm."""
        return AccumulationStats(
            total_steps=self._total_steps,
            optimizer_steps=self.effective_step,
            current_accumulation=self._window.count,
            effective_batch_size=self.effective_batch_size,
            is_accumulating=self.is_window_open,
            last_grad_norm=self._last_grad_norm,
        )

    def micro_batch(self, is_final_batch: bool = False) -> AbstractContextManager[Any]:
        """Return the context for one micro-batch's forward and `accumulate`.

        Args:
            is_final_batch: What `accumulate` will be told.
        """
        ends_window = is_final_batch or self._window.count + 1 >= self._steps
        if self._no_sync is None or ends_window or self._host is not None:
            self._has_unsynchronised = False
            return _SYNCHRONISED
        self._has_unsynchronised = True
        return self._no_sync()

    def accumulate(
        self, loss: Tensor, model: nn.Module, weight: Any = 1, is_final_batch: bool = False
    ) -> bool:
        """Back-propagate the mean `loss` of `weight` items and step where the window ends.

        Args:
            loss: Mean loss of this micro-batch, shape `()`.
            model: Owner of the parameters.
            weight: Items the mean runs over: a number, or a tensor of shape `()` on the loss's
                device. A micro-batch of 0 items contributes nothing; given as a tensor, its
                backward runs, and must be finite as that of PyTorch's own losses is. A bool
                here is `is_final_batch`, which was the third argument before there were weights.
            is_final_batch: End the window here, however few its micro-batches are.

        Returns:
            Whether the optimizer took a step.

        Raises:
            DataError: `loss` is not a scalar with a graph, or `weight` is not usable.
        """
        if isinstance(weight, bool):
            weight, is_final_batch = 1, weight
        if self._host is not None:
            self._total_steps += 1
            return False
        check_loss(loss)
        self._window.back_propagate(loss, self._stepper.scale(loss), weight)
        self._total_steps += 1
        if is_final_batch or self._window.count >= self._steps:
            return self._close()
        return False

    def flush(self, model: nn.Module) -> bool:
        """End an open window; return whether the optimizer took a step."""
        return self._close() if self.is_window_open else False

    def reset_epoch(self) -> None:
        """Drop an open window, with its gradients and a warning."""
        if self.is_window_open:
            warnings.warn(
                f"reset_epoch() dropped {self._window.count} micro-batches of an open window; "
                "pass is_final_batch=True with the last batch, or call flush()",
                stacklevel=2,
            )
            self._stepper.drop(self._window)
            self._has_unsynchronised = False

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the open window, as tensors and numbers.

        The gradients of an open window are copied; they carry the scale of the gradient scaler.
        """
        state: dict[str, Any] = {
            "accumulation_steps": self._steps,
            "total_steps": self._total_steps,
            "optimizer_steps": self._optimizer_steps,
            "skipped_windows": self.skipped_windows,
            "window": self._window.state_dict(),
            "gradients": copy_gradients(self._optimizer) if self.is_window_open else {},
        }
        if self._last_grad_norm is not None:
            state["last_grad_norm"] = self._last_grad_norm
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, and drop what was accumulated here.

        Raises:
            ConfigError: The state holds an open window of another `accumulation_steps`.
            CheckpointError: The state's gradients do not fit the optimizer's parameters.
        """
        saved_steps = state["accumulation_steps"]
        if state["window"]["count"] and saved_steps != self._steps:
            found = f"the state holds an open window of accumulation_steps {saved_steps}"
            action = f"Load it with accumulation_steps={saved_steps}, not {self._steps}."
            raise ConfigError(_message(found, action))
        restore_gradients(self._optimizer, state["gradients"])
        device = self._optimizer.param_groups[0]["params"][0].device
        self._window.load_state_dict(state["window"], device)
        self._has_unsynchronised = self._no_sync is not None and self.is_window_open
        self._total_steps = state["total_steps"]
        self._optimizer_steps = state["optimizer_steps"]
        self.skipped_windows = state["skipped_windows"]
        self._last_grad_norm = state.get("last_grad_norm")
        self._last_window = None
        if self.is_window_open:
            # A scaler begins with its first loss, which is behind us if flush() comes next.
            self._stepper.scale(torch.zeros((), device=device))

    def _close(self) -> bool:
        result = self._stepper.close(self._window, is_averaged=not self._has_unsynchronised)
        self._has_unsynchronised = False
        self._last_window = result
        self.skipped_windows += result.is_skipped
        if result.is_skipped or not result.items:
            return False
        self._optimizer_steps += 1
        self._last_grad_norm = result.grad_norm
        return True


def _check_arguments(counts: Mapping[str, object], max_grad_norm: float | None) -> None:
    for name, value in counts.items():
        if type(value) is not int:
            raise ConfigError(_message(f"{name} must be an integer, got {value!r}"))
        if value < 1:
            raise ConfigError(_message(f"{name} must be >= 1, got {value}"))
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigError(_message(f"max_grad_norm must be > 0 or None, got {max_grad_norm!r}"))


def _message(found: str, action: str = "") -> str:
    return build_message("GradientAccumulator", found, action=action)
