"""One batch through everything, before the run has a folder and a first step."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dovetail.config import TrainConfig
from dovetail.errors import (
    BrokenPluginError,
    ConfigError,
    DataError,
    DovetailError,
    ModelError,
    build_message,
    did_you_mean,
)
from dovetail.run.checkpoint import random_state, set_random_state
from dovetail.run.evaluate import evaluation_mode
from dovetail.run.flops import FlopMeter, count_elements
from dovetail.run.loader import EpochLoader, primary_input
from dovetail.run.losses import Objective
from dovetail.run.naming import Batch
from dovetail.run.tracking.recording import rehearsal
from dovetail.signature import build_call, primary_output, unwrap
from dovetail.task import TaskSpec
from dovetail.types import Collator


def check_collator(collator: Collator, num_workers: int, where: str) -> None:
    """Check that a collator can travel to the workers that are to use it.

    Args:
        collator: What the hook made.
        num_workers: Worker processes of the data loaders.
        where: Whose collator it is, for messages.

    Raises:
        BrokenPluginError: It cannot be pickled.
    """
    if num_workers == 0:
        return
    try:
        pickle.dumps(collator)
    except Exception as err:
        found = f"its collator cannot be pickled: {type(err).__name__}: {err}"
        expected = f"one that can travel to the {num_workers} workers of data.num_workers"
        hint = "Make it an instance of a class at the top of a module, or use no workers."
        raise BrokenPluginError(build_message(where, found, expected, hint)) from err


def try_one_batch(
    model: nn.Module,
    loader: EpochLoader,
    task: TaskSpec,
    objective: Objective,
    transform: tuple[str, nn.Module] | None,
    meter: FlopMeter | None = None,
) -> list[str]:
    """Run one batch through model and loss, and leave no trace.

    Args:
        model: On its device, not compiled yet.
        loader: Gives the batch.
        task: Its sizes are held against the model's output.
        objective: The loss.
        transform: Input name and the preprocessing that runs on the device.
        meter: Measures what the batch costs, in a second pass; `None` saves that.

    Returns:
        Names of the metrics that an evaluation records, those that the model logs included.

    Raises:
        ModelError: The model does not take the batch, or its output does not fit the loss.
        DataError: There is no batch, it cannot be collated, or the labels do not fit.
    """
    state = random_state()
    try:
        batch = next(loader.iterate(0), None)
        if batch is None:
            raise DataError(build_message("data split 'train'", "gave no batch"))
        with rehearsal() as logged:
            names = ["loss", *_forward(model, dict(batch), task, objective, transform, meter)]
        names += ["perplexity"] if objective.has_perplexity else []
        logged.reserve(names)
        return [*(f"val/{name}" for name in names), *logged.names]
    finally:
        set_random_state(state)


def _forward(
    model: nn.Module,
    batch: Batch,
    task: TaskSpec,
    objective: Objective,
    transform: tuple[str, nn.Module] | None,
    meter: FlopMeter | None,
) -> list[str]:
    call = build_call(model, list(batch), needs_labels=objective.needs_labels_in_model)
    num_elements = count_elements(batch, primary_input(task))
    try:
        with evaluation_mode(model), torch.no_grad():
            if transform is not None:
                batch[transform[0]] = transform[1](batch[transform[0]])
            outputs = call(batch)
            check_output_size(task, primary_output(outputs))
            objective.loss(outputs, batch)
            names = list(objective.metrics(outputs, batch))
            if meter is not None:
                meter.measure(lambda: objective.loss(call(batch), batch), model, num_elements)
            return names
    except DovetailError:
        raise
    except Exception as err:
        shapes = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in batch.items())
        found = f"fails on the first batch ({shapes}): {type(err).__name__}: {err}"
        hint = "Check that the model fits the data; the cause's traceback shows where."
        where = f"model {type(unwrap(model)).__name__}"
        raise ModelError(build_message(where, found, action=hint)) from err


def check_output_size(task: TaskSpec, output: Tensor) -> None:
    """Hold a model's output against the sizes a task states.

    Args:
        task: `num_classes` of a classification, `vocab_size` of a language task.
        output: Logits; classes are dimension 1, token ids the last.

    Raises:
        ModelError: The output has another size.
    """
    size, classes = task.vocab_size, task.class_count
    # A vocabulary may be padded to a size the hardware likes.
    if task.counts_tokens and size is not None and output.shape[-1] < size:
        found = f"has {output.shape[-1]} outputs per token"
        raise ModelError(build_message("model output", found, f"at least task.vocab_size = {size}"))
    has_classes = task.kind in ("classification", "multilabel") and classes is not None
    if has_classes and (output.ndim < 2 or output.shape[1] != classes):
        found = f"has the shape {tuple(output.shape)}"
        expected = f"(batch, {classes}), as the task has {classes} classes"
        hint = "Change the model, or task.num_classes and task.labels."
        raise ModelError(build_message("model output", found, expected, hint))


def check_monitor(
    config: TrainConfig, metric_names: Sequence[str], *, has_validation: bool
) -> None:
    """Check that the settings which need an evaluation have one.

    Args:
        config: The `train` section.
        metric_names: What an evaluation records.
        has_validation: Whether there is a validation split.

    Raises:
        ConfigError: `monitor` names a metric that will not exist, or `patience` has nothing to
            wait for.
    """
    if not has_validation:
        if config.patience is not None:
            found = f"got {config.patience}, and the data have no validation split"
            hint = "Return one from the data factory, or remove the key."
            raise ConfigError(build_message("config train.patience", found, action=hint))
        return
    known = [*metric_names, "train/loss", "train/grad_norm"]
    if config.monitor not in known:
        found = f"there is no metric {config.monitor!r}"
        expected = f"one of {', '.join(known)}"
        hint = did_you_mean(config.monitor, known)
        raise ConfigError(build_message("config train.monitor", found, expected, hint))
