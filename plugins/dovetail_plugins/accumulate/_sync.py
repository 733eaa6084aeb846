"""When the ranks average their gradients: once per window, in the backward that ends it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dovetail.errors import ConfigError, build_message
from dovetail_plugins.accumulate._gradients import average_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

_SYNCHRONISED: AbstractContextManager[Any] = nullcontext()


class GradientSync:
    """Turns the averaging of gradients on and off, and makes up for what was left out.

    Args:
        model: A model that averages its gradients over ranks in its backward: of
            `DistributedDataParallel` or `fully_shard`. Any other has nothing to turn off.

    Raises:
        ConfigError: The model is of the first `FullyShardedDataParallel`, whose gradients are
            shards without a sign of it: a norm taken over them would be that of one rank. Or it is
            sharded on CPUs with a torch that adds gradients where it should average them.
    """

    def __init__(self, model: nn.Module | None) -> None:
        _check_sharding(model)
        self._no_sync: Callable[[], AbstractContextManager[Any]] | None
        self._no_sync = getattr(model, "no_sync", None)
        self._shards = _sharded_roots(model)
        if self._shards and num_ranks() > 1:
            _check_averaging(self._shards[0])
        self._is_on = True
        self.is_pending = False
        """Whether gradients wait that the ranks have not averaged."""

    @property
    def can_turn_off(self) -> bool:
        """Whether `micro_batch` makes a difference."""
        return self._no_sync is not None or bool(self._shards)

    @property
    def needs_backward(self) -> bool:
        """Whether each forward must be followed by its backward.

        Other ranks wait for it; and shards that were gathered are let go in it, without which the
        next forward would not see what a step changed.
        """
        return num_ranks() > 1 or bool(self._shards)

    def micro_batch(self, ends_window: bool) -> AbstractContextManager[Any]:
        """Return the context for a forward and its backward."""
        if self._shards and self._is_on != ends_window:
            self._turn(ends_window)
        if ends_window:
            # This backward averages what the ones before it left, too.
            self.is_pending = False
            return _SYNCHRONISED
        self.is_pending = self.can_turn_off
        return _SYNCHRONISED if self._no_sync is None else self._no_sync()

    def finish(self, optimizer: Optimizer) -> None:
        """Average the gradients that wait, outside of a backward; all ranks must call it."""
        if not self.is_pending:
            return
        self.is_pending = False
        if not self._shards:
            average_over_ranks(optimizer)
            return
        self._turn(True)
        for module in self._shards:
            _reduce(module)

    def drop(self, optimizer: Optimizer) -> None:
        """Forget the gradients that wait; of a sharded model all ranks must call it."""
        if self.keeps_gradients_aside:
            # No zero_grad reaches them there.
            self.finish(optimizer)
        self.is_pending = False

    def restore(self, is_window_open: bool) -> None:
        """Take over the gradients of an open window that a state held."""
        # Those of shards were averaged when the state was made.
        self.is_pending = is_window_open and self.can_turn_off and not self._shards

    @property
    def keeps_gradients_aside(self) -> bool:
        """Whether gradients wait somewhere else than in `parameter.grad`."""
        return self.is_pending and bool(self._shards)

    def _turn(self, is_on: bool) -> None:
        self._is_on = is_on
        for module in self._shards:
            module.set_requires_gradient_sync(is_on)


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_sharding(model: nn.Module | None) -> None:
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    kind = getattr(module, "FullyShardedDataParallel", None)
    if kind is not None and isinstance(model, kind):
        raise ConfigError(
            build_message(
                "GradientAccumulator: model",
                "is of FullyShardedDataParallel",
                "one of DistributedDataParallel or fully_shard",
                "Shard it with torch.distributed.fsdp.fully_shard.",
            )
        )


def _check_averaging(module: Any) -> None:
    """Raise `ConfigError` if the ranks of a sharded module would get a sum for a mean."""
    if next(module.parameters()).device.type != "cpu":
        return
    # gloo takes this operation in torch 2.7 and 2.8, too, and adds.
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(num_ranks()), op=dist.ReduceOp.AVG)
    if mean.item() != 1:
        raise ConfigError(
            build_message(
                "GradientAccumulator: model",
                f"gloo of torch {torch.__version__} adds the gradients of fully_shard",
                "their mean over the ranks",
                "Use a newer torch, or DistributedDataParallel.",
            )
        )


def _sharded_roots(model: nn.Module | None) -> list[Any]:
    """Return the outermost modules that `fully_shard` was called on."""
    if model is None:
        return []
    if hasattr(model, "set_requires_gradient_sync"):
        return [model]
    return [root for child in model.children() for root in _sharded_roots(child)]


def _reduce(module: Any) -> None:
    """Run the reduce-scatter that the backward passes of an FSDP root left out."""
    if hasattr(module, "finalize_backward"):
        module.set_manual_backward_finalization(True)
        try:
            module.finalize_backward()
        finally:
            module.set_manual_backward_finalization(False)
        return
    # torch < 2.15 has no public name for it; this is what its own backward ends with.
    finish = getattr(module._get_fsdp_state(), "_root_post_backward_final_callback", None)
    if finish is None:
        raise ConfigError(
            build_message(
                "GradientAccumulator",
                "a window of a sharded model was ended outside of a backward",
                "is_final_batch=True with its last micro-batch",
                "Pass it to micro_batch() and accumulate(), or use a newer torch.",
            )
        )
    finish()
