"""Optimizer, its parameter groups, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dovetail.config import TrainConfig
from dovetail.errors import ConfigError, build_message
from dovetail.imports import import_object
from dovetail.types import Accumulator


def build_optimizer(
    model: nn.Module, config: TrainConfig, search_dir: Path | None = None
) -> Optimizer:
    """Build the optimizer over the parameters that are trained.

    Args:
        model: The model on its device.
        config: The `train` section.
        search_dir: Folder of the config file, for an import path.

    Raises:
        ConfigError: The model has nothing to train, the class is no optimizer, or it does not
            take the arguments.
    """
    groups = _parameter_groups(model, config.weight_decay)
    if not groups:
        found = f"{type(model).__name__} has no parameter that requires a gradient"
        raise ConfigError(build_message("model", found, "something to train"))
    _check_kwargs(config.optimizer_kwargs)
    arguments: dict[str, Any] = {"lr": config.lr, **config.optimizer_kwargs}
    where = "config train.optimizer"
    kind: Any
    if config.optimizer == "adamw":
        kind = AdamW
    elif config.optimizer == "sgd":
        kind = SGD
    else:
        kind = import_object(config.optimizer, where=where, search_dir=search_dir)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            found = f"{config.optimizer!r} is {kind!r}"
            raise ConfigError(build_message(where, found, "a subclass of torch.optim.Optimizer"))
    try:
        optimizer: Optimizer = kind(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as err:
        where = "config train.optimizer_kwargs"
        found = f"{kind.__name__} does not take {arguments}: {err}"
        raise ConfigError(build_message(where, found)) from err
    return optimizer


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that have a field of their own: one of the two would be ignored."""
    for name, path in (("lr", "train.lr"), ("weight_decay", "train.weight_decay")):
        if name in kwargs:
            where = f"config train.optimizer_kwargs.{name}"
            hint = f"Write it as {path}."
            raise ConfigError(build_message(where, f"got {kwargs[name]!r}", "no such key", hint))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    # Decay pulls weights of matrices to zero; on a bias or a norm's gain it only does harm.
    matrices = [p for p in trained if p.ndim >= 2]
    rest = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class LearningRate:
    """Sets the learning rate of an optimizer before each step.

    Args:
        optimizer: Its groups' `lr` are the peaks.
        config: The `train` section.
        total_steps: Optimizer steps of the whole run; `None` where the data have no length.

    Raises:
        ConfigError: The schedule needs a length and there is none.
    """

    def __init__(self, optimizer: Optimizer, config: TrainConfig, total_steps: int | None) -> None:
        if total_steps is None and (config.schedule != "constant" or config.warmup_ratio):
            found = (
                f"the schedule {config.schedule!r} needs the number of steps; the data have none"
            )
            hint = 'Set train.max_steps, or train.schedule = "constant" without warm-up.'
            raise ConfigError(build_message("config train.schedule", found, action=hint))
        # Not its groups: restoring a checkpoint puts new ones in their place.
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._factor = build_factor(config, total_steps or 1)
        self.set_for(0)

    @property
    def value(self) -> float:
        """Learning rate of the first group."""
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def set_for(self, step: int) -> None:
        """Set the learning rate for the optimizer step number `step`, counted from 0."""
        factor = self._factor(step)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor


def build_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the course of the learning rate as a share of its peak, by step from 0.

    The warm-up rises linearly and reaches the peak with its last step. What follows falls from the
    peak to `min_lr_ratio`, as half a cosine or a line.

    Source: Loshchilov and Hutter, SGDR, 2017 (the cosine without restarts).
    """
    warmup_steps = round(config.warmup_ratio * total_steps)
    decay_steps = max(1, total_steps - warmup_steps)
    low = config.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / decay_steps)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "linear":
            return 1.0 - (1.0 - low) * done
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def count_steps(
    config: TrainConfig, batches_per_epoch: int | None, accumulator: Accumulator, num_ranks: int = 1
) -> int | None:
    """Return the optimizer steps of a whole run, or `None` where nobody knows them before.

    Args:
        config: The `train` section.
        batches_per_epoch: Batches of all ranks; `None` where the data have no length.
        accumulator: Says how many of them a step takes.
        num_ranks: Processes that train together.
    """
    limit = config.max_steps
    if batches_per_epoch is None:
        return limit
    num_batches = -(-batches_per_epoch // num_ranks)
    count: Callable[[int, int], int | None] | None = getattr(accumulator, "count_steps", None)
    if count is not None:
        steps = count(num_batches, config.epochs)
    else:
        steps = config.epochs * -(-num_batches // accumulator.accumulation_steps)
    known = [number for number in (steps, limit) if number is not None]
    return min(known, default=None)
