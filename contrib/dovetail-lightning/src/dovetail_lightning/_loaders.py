"""A split as Lightning reads it: one loader for all epochs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dovetail.run.distributed import Ranks
from dovetail.run.loader import EpochLoader


class SplitLoader:
    """The batches of a split as `dovetail train` reads them, each epoch alike.

    Args:
        loader: What is read.
        ranks: Who reads the split together.
    """

    def __init__(self, loader: EpochLoader, ranks: Ranks) -> None:
        self._loader = loader
        self._ranks = ranks

    def __len__(self) -> int:
        """Return the batches of a whole epoch on this rank.

        Raises:
            TypeError: Nobody can know them.
        """
        if not self._loader.is_length_exact:
            raise TypeError("the data have no length")
        return self._loader.num_left(0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches."""
        yield from self._loader.iterate(0)


class TrainingLoader(SplitLoader):
    """The training split, whose epochs differ.

    Lightning tells it the epoch, as it tells a sampler, and keeps its state in a checkpoint.
    """

    _epoch = _start = _num_given = 0
    _is_exhausted = False

    @property
    def sampler(self) -> TrainingLoader:
        """What Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; what is left of another one is left out."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of the epoch, from where a checkpoint stood."""
        # Begun by the first batch that is asked for: Lightning opens the iterator before it tells
        # the epoch.
        self._num_given, self._start = self._start, 0
        self._is_exhausted = False
        for batch in self._loader.iterate(self._epoch, self._num_given * self._ranks.size):
            self._num_given += 1
            yield batch
        self._is_exhausted = True

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were trained on."""
        # Of data without a length Lightning holds one batch that it has not trained on yet.
        is_ahead = not (self._loader.is_length_exact or self._is_exhausted)
        return {"epoch": self._epoch, "position": max(0, self._num_given - is_ahead)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` stood."""
        self._epoch, self._start = state["epoch"], state["position"]
