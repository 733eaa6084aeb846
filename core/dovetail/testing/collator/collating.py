"""How the collator suite makes batches and holds them against each other."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import build_message
from dovetail.signature import LABELS
from dovetail.testing.batches import (
    check_batch,
    find_difference,
    is_equal,
    is_same_row,
    is_same_value,
    number_kind,
    raise_unless,
)
from dovetail.testing.suite import ConformanceError, Suite, reported_by, seeded
from dovetail.types import Collator, Sample

_NUM_DRAWS = 8
_HAS_FLOAT_LABELS = ("regression", "multilabel")


@dataclass(frozen=True)
class Rows:
    """A batch beside the batches of one that its samples make."""

    batch: Mapping[str, Tensor]
    alone: Sequence[Mapping[str, Tensor]]
    keys: Sequence[str]
    """What is compared: keys with a row per sample that are not drawn at random."""

    def is_made_of(self, row: int, sample: int) -> bool:
        """Return whether a row of the batch agrees with a sample alone, up to padding."""
        return not self.odd_keys(row, sample)

    def odd_keys(self, row: int, sample: int) -> list[str]:
        """Return the keys in which they do not agree."""
        alone = self.alone[sample]
        return [
            key
            for key in self.keys
            if key not in alone or not is_same_row(self.batch[key][row], alone[key][0])
        ]


class CollatingSuite(Suite):
    """What the checks of a collator are made of: its samples, and what they become."""

    hook = "collate"
    samples: Sequence[Sample] = ()
    """At least two different samples. Where rows are padded, give samples of several lengths."""
    is_random: bool = False
    """Whether batches are drawn at random: tokens that are masked, say, or images cropped."""
    consumed_keys: Collection[str] = ()
    """Keys of the samples that become others, and are not kept: a raw `text`, say."""
    whole_batch_keys: Collection[str] = ()
    """Keys of the batch that stand for the whole of it and have no row per sample."""
    extra_key: str | None = "sample_index"
    """Key of a whole number that the suite adds, as a stranger's data set may; `None` for none."""

    def build(self) -> Collator:
        """Make the collator as a run does."""
        registry = self.registry()
        return registry.collate(self.name, self.task, self.build_options(registry))

    def collate(
        self, samples: Sequence[Sample], collator: Collator | None = None, seed: int = 0
    ) -> Any:
        """Collate copies of `samples`, with the random generators seeded.

        Args:
            samples: The samples of the batch.
            collator: What collates; a fresh collator where it is left out.
            seed: Seed of every random generator.
        """
        collator = collator or self._built()
        with seeded(seed):
            return collator(copy.deepcopy(list(samples)))

    def test_hook_makes_a_collator(self) -> None:
        """The samples are usable, and the hook answers with a collator for the task."""
        self._check_samples()
        self.build()

    def _check_samples(self) -> None:
        where, samples = f"{type(self).__name__} samples", list(self.samples)
        found = f"got {len(samples)}"
        raise_unless(len(samples) >= 2, where, found, "at least two different samples")
        kinds: list[object] = list(samples)
        odd = [type(sample).__name__ for sample in kinds if not isinstance(sample, Mapping)]
        raise_unless(not odd, where, f"got {', '.join(odd)}", "mappings of names to values")
        is_one = all(is_same_value(dict(samples[0]), dict(sample)) for sample in samples[1:])
        raise_unless(not is_one, where, "all samples are equal", "at least two different samples")

    def _built(self) -> Collator:
        with reported_by("test_hook_makes_a_collator"):
            self._check_samples()
            return self.build()

    def _batch(self) -> dict[str, Tensor]:
        with reported_by("test_batch_is_a_dict_of_tensors"):
            batch: dict[str, Tensor] = self.collate(self.samples)
            check_batch(batch, self.where)
        return batch

    def _singles(self) -> list[dict[str, Tensor]]:
        self._batch()
        with reported_by("test_single_sample_is_a_batch_of_one"):
            return [self._single(sample) for sample in self.samples]

    def _single(self, sample: Sample) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collate([sample])
        check_batch(batch, self.where)
        self._check_rows(batch, 1)
        return batch

    def _rows(self) -> Rows:
        left_out = {*self._drawn_keys(), *self.whole_batch_keys}
        batch = self._batch()
        with reported_by("test_tensors_have_a_row_per_sample"):
            self._check_rows(batch, len(self.samples))
        return Rows(batch, self._singles(), [key for key in batch if key not in left_out])

    def _own_keys(self) -> dict[str, None]:
        """Return the keys of the samples that a batch must have, in their order."""
        keys = dict.fromkeys(key for sample in self.samples for key in sample)
        return {key: None for key in keys if key not in self.consumed_keys}

    def _extra_key(self) -> str:
        if self.extra_key is None:
            raise unittest.SkipTest("extra_key is None")
        return self.extra_key

    def _numbered(self) -> list[Sample]:
        key = self._extra_key()
        return [{**sample, key: index} for index, sample in enumerate(self.samples)]

    def _numbers_in_batch(self) -> list[float] | None:
        """Return the added key's values, or `None` where there is none to go by."""
        if self.extra_key is None:
            return None
        try:
            numbers: Tensor = self.collate(self._numbered())[self.extra_key]
            return numbers.double().flatten().tolist()
        except Exception:  # another check reports that the key is not kept
            return None

    def _drawn_keys(self) -> set[str]:
        """Return the keys whose values differ from call to call, or with the random state."""
        first, collator = self._batch(), self._built()
        batches = [self.collate(self.samples, collator, seed) for seed in range(_NUM_DRAWS)]
        return {k for k in first for b in batches if k in b and not is_equal(first[k], b[k])}

    def _check_rows(self, batch: Mapping[str, Tensor], num_samples: int) -> None:
        for key, value in batch.items():
            is_fine = key in self.whole_batch_keys or value.shape[:1] == (num_samples,)
            found = f"batch[{key!r}] of {num_samples} samples has the shape {tuple(value.shape)}"
            hint = "Name what stands for the whole batch in `whole_batch_keys`."
            raise_unless(is_fine, self.where, found, f"({num_samples}, ...)", hint)

    def _check_labels(self, labels: Tensor) -> None:
        kinds = {number_kind(sample.get(LABELS)) for sample in self.samples}
        found = f"batch['labels'] is {labels.dtype}"
        if "fraction" in kinds:
            expected = "a floating dtype, as the samples' labels are fractions"
            raise_unless(labels.is_floating_point(), self.where, found, expected)
        elif kinds == {"whole"}:
            # Soft and several labels per sample are targets of a float loss.
            may_be_float = self.task.kind in _HAS_FLOAT_LABELS or (
                self.task.kind == "classification" and labels.ndim > 1
            )
            is_fine = labels.dtype == torch.int64 or (may_be_float and labels.is_floating_point())
            expected = f"int64, as the samples' labels are whole numbers of a {self.task.kind}"
            raise_unless(is_fine, self.where, found, expected)

    def _check_same(
        self,
        batch: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        maker: str,
        ignored: Collection[str] = (),
    ) -> None:
        if not self.is_random:
            ignored = ignored or self._drawn_keys()
        difference = find_difference(batch, other, ignored)
        found = f"{maker} gave another batch: {difference}"
        raise_unless(difference is None, self.where, found, "the same batch to the bit")

    def _check_refusal(self, samples: Sequence[Sample], what: str) -> None:
        self._batch()
        expected = "a DataError, or another ValueError, that says what is wrong"
        try:
            self.collate(samples)
        except ValueError as err:
            found = f"{what} raised a {type(err).__name__} without a message"
            raise_unless(bool(str(err).strip()), self.where, found, expected)
        except Exception as err:
            found = f"{what} raised {type(err).__name__}: {err}"
            raise ConformanceError(build_message(self.where, found, expected)) from err
        else:
            raise_unless(False, self.where, f"{what} was collated without a word", expected)
