"""Loss, item count and metrics of each task kind.

A loss is a mean over *items*: samples, or target tokens that are not ignored. The item count goes
to the accumulator as the weight of the micro-batch, so that windows of any make-up equal the one
large batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.errors import ConfigError, DataError, ModelError, build_message
from dovetail.imports import import_object
from dovetail.run.targets import (
    IGNORE_INDEX,
    Items,
    count_items,
    count_targets,
    get_labels,
    get_targets,
)
from dovetail.signature import primary_output
from dovetail.task import TaskKind, TaskSpec

LossFunction: TypeAlias = Callable[[Any, Mapping[str, Tensor]], "tuple[Tensor, Items]"]
MetricFunction: TypeAlias = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """What a run minimises and what its evaluation reports."""

    loss: LossFunction
    """`(outputs, batch) -> (mean loss, items)`."""
    metrics: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    """`(outputs, batch) -> {name: mean over the same items}`; empty for a loss of the user's."""
    needs_labels_in_model: bool = False
    """Whether the model gets the labels, to compute its own loss."""
    has_perplexity: bool = False
    """Whether the loss is a mean over tokens, in nats."""
    is_additive: bool = True
    """Whether the loss of a large batch is the mean of its items' losses. A loss function that
    compares the items of a batch with each other says `is_additive = False` as an attribute."""


def build_objective(task: TaskSpec, loss: str, search_dir: Path | None = None) -> Objective:
    """Return loss and metrics of a task.

    Args:
        task: The task; its kind decides.
        loss: "task", "model", or the import path of a loss function.
        search_dir: Folder of the config file.

    Raises:
        ConfigError: The loss function does not import, or is no function.
    """
    if loss == "task":
        tokens = task.counts_tokens
        return Objective(_TaskLoss(task), _TaskMetrics(task), has_perplexity=tokens)
    if loss == "model":
        return Objective(
            _ModelLoss(task),
            _TaskMetrics(task),
            needs_labels_in_model=True,
            has_perplexity=task.counts_tokens,
        )
    where = "config train.loss"
    function = import_object(loss, where=where, search_dir=search_dir)
    if not callable(function):
        raise ConfigError(
            build_message(where, f"{loss!r} is a {type(function).__name__}", "a function")
        )
    is_additive = bool(getattr(function, "is_additive", True))
    return Objective(UserLoss(function), lambda outputs, batch: {}, is_additive=is_additive)


def check_additive(objective: Objective, accumulation_steps: int | None) -> None:
    """Check that windows of several micro-batches can equal their large batch.

    Args:
        objective: The loss.
        accumulation_steps: Micro-batches of the longest window; `None` where nobody knows.

    Raises:
        ConfigError: The loss is not additive over its items.
    """
    if accumulation_steps != 1 and not objective.is_additive:
        raise ConfigError(
            build_message(
                "config train.loss",
                "the loss says is_additive = False: it compares the items of a batch with each "
                f"other, and those of {accumulation_steps or 'several'} micro-batches never meet",
                "1 micro-batch per optimizer step",
                "Remove the accumulation, and set train.batch_size to the whole batch.",
            )
        )


def perplexity(loss: float) -> float:
    """Return `exp(min(loss, 100))`; the bound keeps an early loss finite."""
    return math.exp(min(loss, 100.0))


class _TaskLoss:
    def __init__(self, task: TaskSpec) -> None:
        self._task = task
        self._compute = _LOSSES[task.kind]

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Items]:
        logits = outputs if isinstance(outputs, Tensor) else primary_output(outputs)
        labels = get_targets(batch, self._task)
        try:
            return self._compute(logits, labels)
        except (IndexError, RuntimeError, ValueError) as err:
            if isinstance(err, DataError | ModelError):
                raise
            raise explain_mismatch(self._task, logits, labels, err) from err


class _TaskMetrics:
    def __init__(self, task: TaskSpec) -> None:
        self._task = task
        self._compute = _METRICS[task.kind]

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._compute(primary_output(outputs), get_targets(batch, self._task))


class _ModelLoss:
    def __init__(self, task: TaskSpec) -> None:
        self._task = task

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Items]:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor):
            found = f"output is a {type(outputs).__name__} without a tensor 'loss'"
            hint = 'Return one, or set train.loss = "task".'
            raise ModelError(build_message("config train.loss = 'model'", found, action=hint))
        _check_scalar(loss, "config train.loss = 'model'")
        return loss, count_items(self._task.kind, get_labels(batch, self._task))


class UserLoss:
    """A loss function of the user's, checked at each call.

    Args:
        function: `(outputs, batch) -> loss` or `-> (loss, items)`; the loss is a mean. Without
            items, the samples of the batch count.
    """

    def __init__(self, function: Callable[[Any, Mapping[str, Tensor]], Any]) -> None:
        self._function = function

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Items]:
        """Return mean loss and items."""
        result = self._function(outputs, batch)
        has_items = isinstance(result, tuple) and len(result) == 2
        loss: Tensor = result[0] if has_items else result
        _check_scalar(loss, "config train.loss")
        if not has_items:
            return loss, next(iter(batch.values())).shape[0]
        items: Items = result[1]
        is_scalar = not items.ndim if isinstance(items, Tensor) else isinstance(items, int | float)
        if not is_scalar:
            found = f"returned {items!r} for the items"
            expected = "a number or a scalar tensor, what the mean loss runs over"
            raise ModelError(build_message("config train.loss", found, expected))
        return loss, items


def _check_scalar(loss: Any, where: str) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        found = f"returned a {type(loss).__name__}{shape}"
        expected = "a scalar tensor, the mean loss, or (mean loss, items)"
        raise ModelError(build_message(where, found, expected))


def _classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Items]:
    # Class dimension 1, as torch has it: (batch, classes) or (batch, classes, height, width).
    if not labels.is_floating_point():
        return _mean_cross_entropy(logits, labels)
    logits = _widen(logits)
    loss = F.cross_entropy(logits, labels.to(logits.dtype))
    return loss, count_items("classification", labels)


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Items]:
    logits = _widen(logits)
    targets = targets if targets.dtype is torch.int64 else targets.long()
    items = count_targets(targets)
    if isinstance(items, int) and items:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX), items
    # A batch without a target has loss 0 and weight 0; torch's own mean would be 0/0.
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (items.clamp(min=1) if isinstance(items, Tensor) else 1), items


def _widen(tensor: Tensor) -> Tensor:
    """Return half-precision values in single precision, and the others as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _multilabel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Items]:
    _check_same_shape(logits, labels)
    logits = _widen(logits)
    targets = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets), labels.shape[0]


def _regression(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Items]:
    outputs, labels = _align(outputs, labels)
    return F.mse_loss(outputs, labels), labels.shape[0]


def _causal_lm(logits: Tensor, labels: Tensor) -> tuple[Tensor, Items]:
    if logits.shape[:2] != labels.shape:
        raise ValueError("logits and labels differ in batch or sequence")
    return _token_loss(logits[:, :-1], labels[:, 1:])


def _token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Items]:
    if logits.shape[:2] != targets.shape:
        raise ValueError("logits and labels differ in batch or sequence")
    return _mean_cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


_LOSSES: dict[TaskKind, Callable[[Tensor, Tensor], tuple[Tensor, Items]]] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "regression": _regression,
    "causal_lm": _causal_lm,
    "masked_lm": _token_loss,
    "seq2seq": _token_loss,
}


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    if labels.is_floating_point():
        labels = labels.argmax(1)
    return _share_of_targets(logits.argmax(1) == labels, labels)


def _label_accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    hits = (logits > 0) == (labels > 0.5)
    return {"accuracy": _share(hits.sum(), hits.numel())}


def _absolute_error(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    outputs, labels = _align(outputs, labels)
    return {"mae": (outputs - labels).abs().mean()}


def _token_accuracy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return _share_of_targets(logits.argmax(-1) == targets, targets)


def _share_of_targets(is_right: Tensor, targets: Tensor) -> dict[str, Tensor]:
    kept = targets != IGNORE_INDEX
    return {"accuracy": _share((is_right & kept).sum(), kept.sum().clamp(min=1))}


def _share(count: Tensor, total: int | Tensor) -> Tensor:
    # Single precision would give other accuracies for other batch sizes, in the eighth digit.
    return count / total if count.device.type == "mps" else count.double() / total


def _shifted_accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return _token_accuracy(logits[:, :-1], labels[:, 1:])


_METRICS: dict[TaskKind, MetricFunction] = {
    "classification": _accuracy,
    "multilabel": _label_accuracy,
    "regression": _absolute_error,
    "causal_lm": _shifted_accuracy,
    "masked_lm": _token_accuracy,
    "seq2seq": _token_accuracy,
}


def _align(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Bring `(batch, 1)` and `(batch,)` together; never broadcast one against the other."""
    if outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    elif labels.ndim == outputs.ndim + 1 and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    _check_same_shape(outputs, labels)
    outputs = _widen(outputs)
    return outputs, labels.to(outputs.dtype)


def _check_same_shape(outputs: Tensor, labels: Tensor) -> None:
    if outputs.shape != labels.shape:
        raise ValueError("model output and labels differ in shape")


def explain_mismatch(
    task: TaskSpec, logits: Tensor, labels: Tensor, err: Exception
) -> DataError | ModelError:
    """Say whether labels or model are at fault when a loss cannot be computed."""
    shapes = f"output {tuple(logits.shape)}, labels {tuple(labels.shape)} {labels.dtype}"
    if task.kind in ("multilabel", "regression"):
        expected = "output and labels of the same shape"
        return ModelError(build_message(f"loss of {task.kind}", shapes, expected))
    dim = -1 if task.counts_tokens else 1
    num_classes = logits.shape[dim] if logits.ndim > 1 else 0
    if not labels.is_floating_point() and labels.numel() and num_classes:
        valid = labels[labels != IGNORE_INDEX]
        if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= num_classes):
            found = f"run from {int(valid.min())} to {int(valid.max())}"
            expected = f"0 to {num_classes - 1}, as the model has {num_classes} outputs"
            hint = "Check the labels, or give the model more outputs."
            return DataError(build_message("labels", found, expected, hint))
    expected = "output (batch, classes) and integer labels (batch,) or soft labels (batch, classes)"
    if task.counts_tokens:
        expected = "output (batch, sequence, vocabulary) and labels (batch, sequence)"
    return ModelError(build_message(f"loss of {task.kind}", f"{shapes}: {err}", expected))
