"""The targets of a batch, and how many items a mean over them runs over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from dovetail.errors import DataError, build_message
from dovetail.signature import LABELS
from dovetail.task import TaskKind, TaskSpec

IGNORE_INDEX = -100
"""Target that counts nowhere."""

Items: TypeAlias = "int | Tensor"


def get_labels(batch: Mapping[str, Tensor], task: TaskSpec) -> Tensor:
    """Return the targets of a batch.

    Raises:
        DataError: There are none.
    """
    labels = batch.get(LABELS)
    if labels is None:
        found = f"has the keys {', '.join(batch)}"
        hint = "Give the samples labels, or set train.loss to a function of your own."
        raise DataError(build_message("batch", found, f"{LABELS!r} for {task.kind}", hint))
    return labels


def get_targets(batch: Mapping[str, Tensor], task: TaskSpec) -> Tensor:
    """Return the labels of a batch without those that no prediction belongs to.

    A causal language model predicts each token from the one before it. Where that one is padding,
    as before the first token of a row that is padded on the left, there is nothing to predict from:
    the same rows give the same loss on whichever side they are padded.

    Raises:
        DataError: There are no labels.
    """
    labels = get_labels(batch, task)
    mask = batch.get("attention_mask")
    if task.kind != "causal_lm" or mask is None or mask.shape != labels.shape:
        return labels
    is_from_padding = F.pad(mask[:, :-1] == 0, (1, 0), value=False)
    return labels.masked_fill(is_from_padding, IGNORE_INDEX)


def count_items(kind: TaskKind, labels: Tensor) -> Items:
    """Return how many items the mean loss of a batch runs over.

    Args:
        kind: The task's kind.
        labels: The targets, as the loss takes them.

    Returns:
        A number, or a scalar int64 tensor on the labels' device where reading it would wait.
    """
    if kind == "causal_lm":
        return count_targets(labels[..., 1:])
    if kind in ("masked_lm", "seq2seq"):
        return count_targets(labels)
    if kind == "classification":
        if not labels.is_floating_point():
            return count_targets(labels)
        if labels.ndim > 1:
            return labels.numel() // labels.shape[1]
    return labels.shape[0]


def count_targets(targets: Tensor) -> Items:
    """Return how many targets are not ignored; a tensor where reading it would wait."""
    if targets.device.type != "cpu":
        return (targets != IGNORE_INDEX).sum()
    # Most batches ignore nothing, which the least of them tells in a third of the time.
    if targets.numel() and targets.min().item() >= 0:
        return targets.numel()
    return int((targets != IGNORE_INDEX).sum())
