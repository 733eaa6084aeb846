"""Evaluation: metrics over a split, weighted by items, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dovetail.run.distributed import ALONE, Ranks
from dovetail.run.loader import EpochLoader
from dovetail.run.losses import Objective, perplexity
from dovetail.run.naming import Batch
from dovetail.run.shards import Filler
from dovetail.run.tracking.recording import muted


def evaluate(
    model: nn.Module,
    bind: Callable[[Batch], Callable[[Batch], Any]],
    loader: EpochLoader,
    objective: Objective,
    *,
    transform: tuple[str, nn.Module] | None = None,
    autocast: Callable[[], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[Sequence[str], Any], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float] | None:
    """Return the means of loss and metrics over all items of a split, those of all ranks.

    Args:
        model: In any mode; it is put back into it.
        bind: Returns, for a batch, what calls the model with batches like it.
        loader: The split.
        objective: Loss and metrics.
        transform: Input name and the preprocessing that runs on the device.
        autocast: Opens the autocast of the run's precision.
        should_stop: Asked before each batch.
        on_batch: Called after each batch with the names that are returned, and its items.
        ranks: Who evaluates the split together.

    Returns:
        `loss`, the objective's metrics and, for language, `perplexity`; `None` where it was
        stopped or the split has no item.
    """
    sums: dict[str, Any] = {}
    total: Any = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in loader.iterate(0):
            if should_stop():
                return None
            if transform is not None:
                name, module = transform
                batch[name] = module(batch[name])
            is_filler = type(batch) is Filler
            with (
                autocast() if autocast is not None else nullcontext(),
                muted() if is_filler else nullcontext(),
            ):
                outputs = bind(batch)(batch)
                loss, items = objective.loss(outputs, batch)
                means = {"loss": loss, **objective.metrics(outputs, batch)}
            if is_filler:
                # Whoever has nothing but fillers adds zeros to the sums of the others.
                sums = dict.fromkeys(means, 0.0) | sums
                continue
            # Sums stay on the device; the one wait for it comes after the last batch. They are
            # double where the device has it: a large split loses digits in single precision.
            for name, mean in means.items():
                wide = mean if mean.device.type == "mps" else mean.double()
                sums[name] = sums.get(name, 0) + wide * items
            total = total + items
            if on_batch is not None:
                on_batch([*means, "perplexity"] if objective.has_perplexity else [*means], items)
    count, *totals = ranks.add_up([float(total), *map(float, sums.values())])
    if count == 0:
        return None
    values = {name: value / count for name, value in zip(sums, totals, strict=True)}
    if objective.has_perplexity:
        values["perplexity"] = perplexity(values["loss"])
    return values


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which every submodule is in evaluation mode; each gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
