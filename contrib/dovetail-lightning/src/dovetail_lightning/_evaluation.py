"""What an evaluation sums: means over all items of a split, those of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dovetail.run.distributed import Ranks
from dovetail.run.losses import perplexity


class EvaluationSums:
    """Sums of metrics times items, on the device until the end.

    Args:
        ranks: Who evaluates the split together.
        has_perplexity: Whether the loss is a mean over tokens, in nats.
    """

    def __init__(self, ranks: Ranks, *, has_perplexity: bool) -> None:
        self._ranks = ranks
        self._has_perplexity = has_perplexity
        self._sums: dict[str, Any] = {}
        self._num_items: Any = 0

    def add(self, means: Mapping[str, Tensor], items: Any) -> list[str]:
        """Add the means of a batch over its items; return the names of the metrics to come."""
        for name, mean in means.items():
            # A large split loses digits in single precision.
            wide = mean if mean.device.type == "mps" else mean.double()
            self._sums[name] = self._sums.get(name, 0) + wide * items
        self._num_items = self._num_items + items
        return [*means, "perplexity"] if self._has_perplexity else [*means]

    def add_nothing(self, names: Mapping[str, Tensor]) -> None:
        """Know the names, so that a rank with nothing else adds zeros to the others' sums."""
        self._sums = dict.fromkeys(names, 0.0) | self._sums

    def close(self) -> dict[str, float]:
        """Return the means; none where there was no item. All ranks call it together."""
        count, *totals = self._ranks.add_up(
            [float(self._num_items), *map(float, self._sums.values())]
        )
        if not count:
            return {}
        values = {name: total / count for name, total in zip(self._sums, totals, strict=True)}
        if self._has_perplexity:
            values["perplexity"] = perplexity(values["loss"])
        return values
