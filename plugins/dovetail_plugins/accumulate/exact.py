"""Gradient accumulation whose step equals that of the one large batch, whatever the lengths."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, build_message
from dovetail.types import AccumulationStats, WindowResult
from dovetail_plugins.accumulate._gradients import copy_gradients, restore_gradients
from dovetail_plugins.accumulate._schedule import (
    Steps,
    WindowSchedule,
    check_additive,
    check_count,
    message,
)
from dovetail_plugins.accumulate._statistics import warn_of_batch_statistics
from dovetail_plugins.accumulate._stepper import Stepper
from dovetail_plugins.accumulate._sync import GradientSync, num_ranks
from dovetail_plugins.accumulate._window import Window, check_loss
from dovetail_plugins.accumulate.hosts import Host, check_conflict, find_host
from dovetail_plugins.accumulate.windows import Batch, MicroBatch, plan_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

__all__ = ["GradientAccumulator", "Options", "WindowResult", "dovetail_accumulate"]

dovetail_api = 1


_Count = Annotated[int, Field(strict=True, ge=1)]


class Options(PluginOptions):
    """Options of `[accumulate.exact]`."""

    steps: _Count | Annotated[dict[Annotated[int, Field(ge=0)], _Count], Field(min_length=1)] = 1
    """Micro-batches per optimizer step; a table `{ 0 = 1, 1000 = 4 }` sets them from a step on."""
    tokens_per_step: PositiveInt | None = None
    """Instead of `steps`: end a window with the micro-batch whose items make it this many."""
    max_grad_norm: PositiveFloat | Literal["off"] = 1.0
    """L2 norm that a step's gradient is clipped to; "off" leaves it as it is."""


@hookimpl
def dovetail_accumulate(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, options: Options
) -> GradientAccumulator:
    """Make the accumulator of a run."""
    if options.tokens_per_step is not None and num_ranks() > 1:
        # Only who reads ahead on every rank, as `plan` does, knows where such a window ends.
        raise ConfigError(
            build_message(
                "config accumulate.exact.tokens_per_step",
                f"got {options.tokens_per_step} for a run on {num_ranks()} processes",
                "one process",
                "Set accumulate.exact.steps, whose windows weigh every token alike, too.",
            )
        )
    return GradientAccumulator(
        optimizer,
        accumulation_steps=options.steps,
        max_grad_norm=None if options.max_grad_norm == "off" else options.max_grad_norm,
        scaler=scaler,
        model=model,
        tokens_per_step=options.tokens_per_step,
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
        accumulation_steps: Micro-batches per optimizer step; or a mapping from the optimizer step,
            counted from 0, to the number that holds from there on.
        max_grad_norm: L2 norm to clip to; `None` does not clip.
        scaler: Gradient scaler of an fp16 run. Its state is saved and restored by its owner.
        batch_size: Samples per micro-batch, for `effective_batch_size`.
        trainer: What this runs under: a Lightning trainer, an HF Trainer, an Accelerator, a
            DeepSpeed engine. If that accumulates and `accumulation_steps` is 1, everything is left
            to it. Any other object is ignored.
        model: A model of `DistributedDataParallel` or `fully_shard`, whose ranks are to average
            their gradients once per window: `micro_batch` sees to that.
        is_additive: Whether the loss of the large batch is the mean of its items' losses. It is
            not for a contrastive loss or one with in-batch negatives, whose items are compared
            with each other: no window of several micro-batches equals their large batch.
        tokens_per_step: Instead of `accumulation_steps`: a window ends with the micro-batch in
            which its items reach this number. The weights must be numbers, not tensors. Several
            ranks count as one, and need `plan` to know it.

    Raises:
        ConfigError: A number is out of range, or the loss is not additive and
            `accumulation_steps` above 1.
        AccumulationConflictError: The trainer accumulates too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation_steps: Steps = 1,
        max_grad_norm: float | None = 1.0,
        scaler: GradScaler | None = None,
        batch_size: int = 1,
        trainer: Any = None,
        model: nn.Module | None = None,
        is_additive: bool = True,
        tokens_per_step: int | None = None,
    ) -> None:
        self._schedule = WindowSchedule(accumulation_steps, tokens_per_step)
        check_count("batch_size", batch_size)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(message(f"max_grad_norm must be > 0 or None, got {max_grad_norm!r}"))
        if not is_additive:
            check_additive(self._schedule)
        host = find_host(trainer)
        # A window of tokens has more than one micro-batch, as a rule.
        check_conflict(host or find_host(model, optimizer), self._schedule.most or 2)
        self._host: Host | None = host if host is not None and host.steps > 1 else None
        self._optimizer = optimizer
        self._steps = self._schedule.at(0)
        self._stepper = Stepper(optimizer, scaler, max_grad_norm, num_ranks())
        self._batch_size = batch_size
        self._sync = GradientSync(model if self._host is None else None)
        self._window = Window(self._steps, num_ranks(), self._sync.needs_backward, tokens_per_step)
        self._is_model_checked = not self._schedule.may_accumulate
        self._total_steps = 0
        self._optimizer_steps = 0
        self._last_grad_norm: float | None = None
        self._last_window: WindowResult | None = None
        if self._host is not None and self._host.count_steps is None:
            # Nobody else counts them.
            wrapped = getattr(optimizer, "optimizer", optimizer)
            wrapped.register_step_post_hook(self._on_host_step)
        self.skipped_windows = 0
        """Windows dropped because their loss or gradient was not finite."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in a full window, now; 1 where tokens end it."""
        return self._steps

    @property
    def max_accumulation_steps(self) -> int | None:
        """Micro-batches of the longest window; `None` where tokens end it."""
        return self._schedule.most

    def count_steps(self, num_batches: int, num_epochs: int = 1) -> int | None:
        """Return the optimizer steps of whole epochs; `None` where tokens end a window.

        Args:
            num_batches: Micro-batches of an epoch.
            num_epochs: Epochs, from the first step on.
        """
        return self._schedule.count(num_batches, num_epochs)

    def plan(
        self, batches: Iterable[Batch], count_items: Callable[[Batch], float]
    ) -> Iterator[MicroBatch[Batch]]:
        """Yield the batches of an epoch with what is known of their windows: a window read ahead.

        With several ranks all must iterate, and those that run out of data repeat their last batch
        with 0 items, so that none waits for another in vain:

            for each in accumulator.plan(loader, count_tokens):
                with accumulator.micro_batch(each.is_final):
                    loss = mean_loss(model(each.batch))
                    accumulator.accumulate(loss, model, each.items, each.is_final)

        Args:
            batches: The batches of this rank, on any device.
            count_items: Items that the mean loss of a batch runs over.
        """
        # A window that was skipped takes no step, but is one to the ranks that read ahead.
        first = self._optimizer_steps
        return plan_windows(
            batches,
            lambda num_windows: self._schedule.at(first + num_windows),
            count_items,
            items_per_step=self._schedule.items_per_step,
        )

    @property
    def effective_step(self) -> int:
        """Optimizer steps taken; those of the trainer where it accumulates."""
        if self._host is None or self._host.count_steps is None:
            return self._optimizer_steps
        return self._host.count_steps()

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step and rank: micro-batch size times accumulation steps."""
        return self._batch_size * self._steps

    @property
    def is_lightning_managed(self) -> bool:
        """Whether a Lightning trainer accumulates and steps, and this object does nothing."""
        return self._host is not None and self._host.is_lightning

    @property
    def is_host_managed(self) -> bool:
        """Whether a loop of somebody else accumulates and steps, and this object does nothing."""
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
        return self._sync.micro_batch(is_final_batch or self._window.is_next_last)

    def accumulate(
        self, loss: Tensor, model: nn.Module, weight: Any = 1, is_final_batch: bool = False
    ) -> bool:
        """Back-propagate the mean `loss` of `weight` items and step where the window ends.

        Args:
            loss: Mean loss of this micro-batch, shape `()`.
            model: Owner of the parameters.
            weight: Items the mean runs over: a number, or a tensor of shape `()` on the loss's
                device. A micro-batch of 0 items contributes nothing; given as a tensor, or where
                other ranks wait for it, its backward runs, and must be finite as that of
                PyTorch's own losses is. A bool here is `is_final_batch`, which was the third
                argument before there were weights.
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
        if not self._is_model_checked:
            self._is_model_checked = True
            warn_of_batch_statistics(model)
        self._window.back_propagate(loss, self._stepper.scale(loss), weight)
        self._total_steps += 1
        if is_final_batch or self._window.is_full:
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
            self._sync.drop(self._optimizer)
            self._stepper.drop(self._window)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the open window, as tensors and numbers.

        The gradients of an open window are copied; they carry the scale of the gradient scaler.
        They are those of this rank; of a model of `fully_shard` they are averaged first, for
        which all ranks must ask together.
        """
        if self._sync.keeps_gradients_aside:
            self._sync.finish(self._optimizer)
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
        steps = self._schedule.at(state["optimizer_steps"])
        if state["window"]["count"] and saved_steps != steps:
            found = f"the state holds an open window of accumulation_steps {saved_steps}"
            action = f"Load it with accumulation_steps={saved_steps}, not {steps}."
            raise ConfigError(message(found, action))
        self._sync.drop(self._optimizer)
        restore_gradients(self._optimizer, state["gradients"])
        device = self._optimizer.param_groups[0]["params"][0].device
        self._window.load_state_dict(state["window"], device)
        self._sync.restore(self.is_window_open)
        self._total_steps = state["total_steps"]
        self._optimizer_steps = state["optimizer_steps"]
        self.skipped_windows = state["skipped_windows"]
        self._last_grad_norm = state.get("last_grad_norm")
        self._last_window = None
        self._resize()
        if self.is_window_open:
            # A scaler begins with its first loss, which is behind us if flush() comes next.
            self._stepper.scale(torch.zeros((), device=device))

    def _on_host_step(self, *_: Any) -> None:
        self._optimizer_steps += 1

    def _close(self) -> bool:
        self._sync.finish(self._optimizer)
        result = self._stepper.close(self._window)
        self._last_window = result
        self.skipped_windows += result.is_skipped
        if result.is_skipped or not result.items:
            return False
        self._optimizer_steps += 1
        self._last_grad_norm = result.grad_norm
        self._resize()
        return True

    def _resize(self) -> None:
        if not self._schedule.is_constant:
            self._steps = self._window.steps = self._schedule.at(self._optimizer_steps)
