"""Exact steps inside a loop of somebody else that divides each loss by a number of its own.

Lightning, Accelerate and HF Trainer accumulate by the number of micro-batches, and average over
ranks. With the whole window read ahead the factor is known that makes up for it, micro-batch by
micro-batch; `loss * factor` in the user's step is all that is left to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from dovetail.errors import AccumulationConflictError, ConfigError, build_message
from dovetail_plugins.accumulate.windows import MicroBatch, plan_windows

Batch = TypeVar("Batch")
Divisor: TypeAlias = Literal["steps", "length", "nothing"]


class ExactBatches(Generic[Batch]):
    """A loader whose batches come with the factor that their loss must be multiplied by.

    Micro-batch `i` of a window has the mean loss `l_i` over `n_i` items. The host steps with the
    mean of `l_i / d` over the ranks, summed over the window; of `l_i * f_i` with
    `f_i = d * num_ranks * n_i / sum(n)` that is `sum(n_i * l_i) / sum(n)`, the loss of the one
    large batch. `sum(n)` runs over the window and all ranks.

    It yields `(batch, factor)`, or the batch, a mapping, with the factor under `key`. The factor is
    a Python float. What else the loader has is found here too: `sampler`, `dataset`, `set_epoch`.

    A rank that runs out of data repeats its last batch with factor 0 until all are through.

    Args:
        loader: The batches of this rank: for Accelerate the prepared loader, not the one before.
        accumulation_steps: What the host is told to accumulate over.
        count_items: Items that the mean loss of a batch runs over: samples, or target tokens that
            are not ignored. Of a language model that shifts inside, count `labels[:, 1:]`.
        key: Where a mapping takes the factor.
        divided_by: What `d` is: "steps" for Lightning and Accelerate, which divide the tail of an
            epoch, too, by `accumulation_steps`; "length" for HF Trainer, which divides by the
            micro-batches that the window has; "nothing" for a host that adds.
        process_group: The ranks that average their gradients; all, unless given.

    Raises:
        ConfigError: `accumulation_steps` is no integer above 0.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        accumulation_steps: int,
        count_items: Callable[[Batch], float],
        *,
        key: str | None = None,
        divided_by: Divisor = "steps",
        process_group: Any = None,
    ) -> None:
        if type(accumulation_steps) is not int or accumulation_steps < 1:
            found = f"accumulation_steps must be >= 1, got {accumulation_steps!r}"
            raise ConfigError(build_message("ExactBatches", found))
        if divided_by not in ("steps", "length", "nothing"):
            expected = '"steps", "length" or "nothing"'
            raise ConfigError(
                build_message("ExactBatches: divided_by", f"got {divided_by!r}", expected)
            )
        self._loader = loader
        self._steps = accumulation_steps
        self._count_items = count_items
        self._key = key
        self._divided_by = divided_by
        self._process_group = process_group
        self.end_of_dataloader = False
        """Whether the last micro-batch is out; Accelerate ends its window there."""

    @property
    def remainder(self) -> int:
        """Samples of the last batch, where Accelerate knows; else -1."""
        return int(getattr(self._loader, "remainder", -1))

    def __len__(self) -> int:
        """Return the number of batches, if the loader has one."""
        return len(self._loader)  # type: ignore[arg-type]  # raises TypeError where it has none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, a window read ahead."""
        state = self._gradient_state()
        self.end_of_dataloader = False
        windows = plan_windows(
            self._loader, self._steps, self._count_items, process_group=self._process_group
        )
        is_known = False
        try:
            for each in windows:
                if state is not None and not is_known:
                    # After the prepared loader, which has put itself there with its first batch
                    # and would end the window as soon as it is read to its end.
                    state._add_dataloader(self)
                    is_known = True
                self.end_of_dataloader = each.is_last
                yield self._attach(each)
        finally:
            if state is not None:
                state._remove_dataloader(self)

    def _attach(self, micro_batch: MicroBatch[Batch]) -> Any:
        batch, factor = micro_batch.batch, self._factor(micro_batch)
        if self._key is None:
            return batch, factor
        if not isinstance(batch, Mapping):
            raise ConfigError(
                build_message(
                    "ExactBatches: key",
                    f"got {self._key!r} for a batch that is a {type(batch).__name__}",
                    "a mapping to put the factor into",
                    "Leave key out, and take (batch, factor).",
                )
            )
        taken = dict(batch)
        taken[self._key] = factor
        return taken

    def _factor(self, each: MicroBatch[Batch]) -> float:
        if not each.window_items:
            return 0.0
        divisors = {"steps": self._steps, "length": each.window_length, "nothing": 1}
        divisor = divisors[self._divided_by]
        return divisor * each.num_ranks * each.items / each.window_items

    def _gradient_state(self) -> Any:
        """Return Accelerate's own record of loaders, if the loader is one of Accelerate's."""
        module = sys.modules.get("accelerate.data_loader")
        kind = getattr(module, "DataLoaderStateMixin", None)
        if kind is None or not isinstance(self._loader, kind):
            return None
        state = self._loader.gradient_state
        if state.num_steps not in (1, self._steps):
            raise AccumulationConflictError(
                "ExactBatches: conflict: the windows are of different lengths\n"
                f"  accumulation_steps: {self._steps}\n"
                f"  gradient_accumulation_steps: {state.num_steps} (Accelerator)\n"
                "Resolution options:\n"
                "  1. Give ExactBatches the accelerator's gradient_accumulation_steps.\n"
                "  2. Set the accelerator's gradient_accumulation_steps to that of ExactBatches.\n"
                "  3. Accumulate with a GradientAccumulator, and set the accelerator's to 1."
            )
        return state
