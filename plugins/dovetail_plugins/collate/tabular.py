"""Stacks rows of numbers, and any other samples whose arrays have equal shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dovetail import PluginOptions, hookimpl
from dovetail.types import Sample
from dovetail_plugins.collate.labels import check_samples, stack_labels, stack_values

if TYPE_CHECKING:
    from torch import Tensor

    from dovetail import TaskSpec

__all__ = ["TabularCollator", "dovetail_collate"]

dovetail_api = 1

_WHERE = "collator 'tabular'"
_LABELS = "labels"


class TabularCollator:
    """Stacks every key of the samples; nothing is padded, scaled or dropped.

    Args:
        is_regression: Make whole-number labels float32, as a regression needs them.
    """

    def __init__(self, is_regression: bool = False) -> None:
        self.is_regression = is_regression

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples in their order.

        Args:
            samples: Mappings with the same keys; the values of a key have one shape. `labels` are
                numbers or vectors.

        Returns:
            Each key as `(batch, ...)`: tensors and arrays keep their dtype, numbers and lists
            become int64, float32 or bool; `labels` as the vision and text collators make them.

        Raises:
            DataError: There are no samples, or their keys, shapes or types disagree.
        """
        check_samples(_WHERE, samples)
        batch: dict[str, Tensor] = {}
        for key in samples[0]:
            values = [sample[key] for sample in samples]
            if key == _LABELS:
                batch[key] = stack_labels(_WHERE, values, as_float=self.is_regression)
            else:
                batch[key] = stack_values(_WHERE, key, values)
        return batch


@hookimpl
def dovetail_collate(task: TaskSpec, options: PluginOptions) -> TabularCollator | None:
    """Make the collator of a tabular task; `None` for any other modality."""
    if task.modality != "tabular":
        return None
    return TabularCollator(is_regression=task.kind == "regression")
