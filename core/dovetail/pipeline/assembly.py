"""Puts together what the loop works with, and tries it on one batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dovetail.pipeline.setup import Setup
from dovetail.preflight import check_monitor, try_one_batch
from dovetail.run.checkpoint import Progress, load_weights
from dovetail.run.device import build_scaler
from dovetail.run.fit import FitParts
from dovetail.run.loader import primary_input
from dovetail.run.losses import build_objective, check_additive
from dovetail.run.observer import RunObserver, RunPlan
from dovetail.run.schedule import LearningRate, build_optimizer, count_steps
from dovetail.run.system import RunCounters
from dovetail.run.wrapping import WholeOptimizer, copy_hollow, wrap_model


@dataclass(frozen=True)
class Assembly:
    """A run that is ready to begin."""

    parts: FitParts
    plan: RunPlan
    hollow: nn.Module | None = None
    """A copy of the model without memory, where the one that trains is divided among the ranks."""


def assemble(
    setup: Setup, observer: RunObserver, progress: Progress, checkpoint: Path | None
) -> Assembly:
    """Make everything the loop works with; all ranks call this together.

    Args:
        setup: What the run is made of.
        observer: Hears of the progress.
        progress: How far the run has come.
        checkpoint: What it goes on from; its weights are loaded.
    """
    config, train, ranks = setup.config, setup.config.train, setup.ranks
    train_loader = setup.build_loader(setup.splits.train, is_training=True)
    validation_loader = None
    if setup.splits.validation is not None:
        validation_loader = setup.build_loader(setup.splits.validation, is_training=False)
    with ranks.together():
        objective = build_objective(config.task, train.loss, setup.checked.directory)
        meter = setup.meter if config.log.system_s else None
        names = try_one_batch(
            setup.model, train_loader, config.task, objective, setup.transform, meter
        )
        check_monitor(train, names, has_validation=validation_loader is not None)
    num_parameters = sum(p.numel() for p in setup.model.parameters())
    model, hollow = _wrap(setup, checkpoint)
    with ranks.together():
        optimizer = build_optimizer(model, train, setup.checked.directory)
        scaler = build_scaler(train, setup.device)
        ((name, options),) = setup.checked.options("accumulate").items()
        accumulator = setup.registry.accumulate(name, model, optimizer, scaler, options)
        steps = accumulator.accumulation_steps
        check_additive(objective, getattr(accumulator, "max_accumulation_steps", steps))
        total_steps = count_steps(train, train_loader.num_batches, accumulator, ranks.size)
        learning_rate = LearningRate(optimizer, train, total_steps)
    parts = FitParts(
        model=model,
        train_loader=train_loader,
        validation_loader=validation_loader,
        objective=objective,
        accumulator=accumulator,
        learning_rate=learning_rate,
        config=train,
        saved={
            "optimizer": optimizer if hollow is None else WholeOptimizer(optimizer),
            "scaler": scaler,
            "accumulator": accumulator,
        },
        transform=setup.transform,
        observer=observer,
        counters=RunCounters(primary_input(config.task)),
        ranks=ranks,
    )
    plan = RunPlan(
        name=config.run.name,
        device=ranks.describe(setup.device),
        num_parameters=num_parameters,
        num_epochs=train.epochs,
        batches_per_epoch=train_loader.num_batches,
        total_steps=total_steps,
        first_epoch=progress.epoch,
    )
    return Assembly(parts, plan, hollow)


def _wrap(setup: Setup, checkpoint: Path | None) -> tuple[nn.Module, nn.Module | None]:
    """Load, compile and wrap the model, in this order."""
    model, section, ranks = setup.model, setup.config.distributed, setup.ranks
    hollow = None
    with ranks.together():
        if checkpoint is not None and ranks.is_first:  # the others get them from it
            load_weights(checkpoint, model)
        if ranks.size > 1 and section.strategy == "fsdp":
            hollow = copy_hollow(model)
        for name, options in setup.checked.options("compile").items():
            model = setup.registry.compile(name, model, setup.config.task, options)
    return wrap_model(model, section, ranks, setup.device), hollow
