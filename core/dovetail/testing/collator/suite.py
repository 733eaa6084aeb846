"""Conformance of the collate hook: what every collator owes its run."""

from __future__ import annotations

import copy
import json
import pickle
import unittest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dovetail.errors import build_message
from dovetail.run.loader import primary_input
from dovetail.signature import LABELS
from dovetail.testing.batches import (
    check_batch,
    find_difference,
    has_float64,
    is_close,
    is_equal,
    is_same_value,
    raise_unless,
)
from dovetail.testing.collator.collating import CollatingSuite
from dovetail.testing.suite import ConformanceError, reported_by, seeded

_WORKER_TIMEOUT_S = 300


class CollatorSuite(CollatingSuite):
    """Checks of a collator, on samples of the author's.

    One check starts a worker process, which must be able to import the collator's module; a
    script that calls `CollatorSuite.check` does so under `if __name__ == "__main__"`.
    """

    def test_batch_is_a_dict_of_tensors(self) -> None:
        """A batch is a plain dict of tensors with names."""
        check_batch(self.collate(self.samples), self.where)

    def test_tensors_have_a_row_per_sample(self) -> None:
        """The first dimension of every tensor is the number of samples."""
        self._check_rows(self._batch(), len(self.samples))
        # Of another size too: by chance the number of samples may be a size of their arrays.
        more = [*self.samples, self.samples[0]]
        self._check_rows(self.collate(more), len(more))

    def test_single_sample_is_a_batch_of_one(self) -> None:
        """A batch of one sample has the batch dimension too."""
        with reported_by("test_tensors_have_a_row_per_sample"):
            self.test_tensors_have_a_row_per_sample()
        for sample in self.samples:
            self._single(sample)

    def test_every_key_is_kept(self) -> None:
        """Every key of the samples is a key of the batch."""
        batch = self._batch()
        lost = [key for key in self._own_keys() if key not in batch]
        found = f"the batch lacks {', '.join(map(repr, lost))} of the samples"
        hint = "Stack every key, or name what becomes another key in `consumed_keys`."
        raise_unless(not lost, self.where, found, "every key of the samples", hint)

    def test_unknown_key_is_kept(self) -> None:
        """A key that the collator does not know is kept too."""
        key = self._extra_key()
        self._batch()
        batch = self.collate(self._numbered())
        check_batch(batch, self.where)
        found = f"the batch lacks {key!r}, a number that every sample was given"
        hint = "Stack keys you do not know; extra_key = None if none can be there."
        raise_unless(key in batch, self.where, found, "every key of the samples", hint)

    def test_order_is_kept(self) -> None:
        """Row i of a batch is made of sample i."""
        expected = "the rows in the order of the samples"
        numbers = self._numbers_in_batch()
        found = f"the number of each sample, {self.extra_key!r}, came out as {numbers}"
        in_order = numbers is None or numbers == list(range(len(self.samples)))
        raise_unless(in_order, self.where, found, expected)
        rows = self._rows()
        everyone = range(len(self.samples))
        for row in everyone:
            twins = [sample for sample in everyone if rows.is_made_of(row, sample)]
            found = f"row {row} is that of sample {twins[0] if twins else '?'}"
            raise_unless(not twins or row in twins, self.where, found, expected)

    def test_row_does_not_depend_on_its_batch(self) -> None:
        """A sample makes the same row in any batch, but for the padding."""
        rows = self._rows()
        everyone = range(len(self.samples))
        for row in everyone:
            has_twin = any(rows.is_made_of(row, sample) for sample in everyone)
            keys = ", ".join(map(repr, rows.odd_keys(row, row)))
            found = f"{keys} of sample {row} differ alone and in a batch"
            raise_unless(has_twin, self.where, found, "the same values, up to padding")

    def test_dtypes_do_not_depend_on_the_batch(self) -> None:
        """The same keys have the same dtypes, whichever samples make the batch."""
        whole = {key: value.dtype for key, value in self._batch().items()}
        for sample, batch in zip(self.samples, self._singles(), strict=True):
            dtypes = {key: value.dtype for key, value in batch.items()}
            odd = sorted(k for k in {*whole, *dtypes} if whole.get(k) != dtypes.get(k))
            pairs = ", ".join(f"{k!r}: {dtypes.get(k)} and {whole.get(k)}" for k in odd)
            found = f"alone and in a batch, {pairs} (sample with the keys {sorted(sample)})"
            raise_unless(not odd, self.where, found, "the same dtypes in every batch")

    def test_dtypes_fit_the_samples(self) -> None:
        """No float64 that is not the samples' own; labels stay whole numbers or fractions."""
        batch = self._batch()
        for key, tensor in batch.items():
            givers = [key] if key in self._own_keys() else list(self._own_keys())
            is_own = any(has_float64(sample.get(k)) for sample in self.samples for k in givers)
            is_fine = tensor.dtype != torch.float64 or is_own
            found = f"batch[{key!r}] is float64, and no sample's {key!r} is"
            raise_unless(is_fine, self.where, found, "float32, which models are made of")
        if LABELS in batch and LABELS not in self.consumed_keys:
            self._check_labels(batch[LABELS])

    def test_same_samples_give_the_same_batch(self) -> None:
        """The same samples, from the same random state, give the same batch to the bit."""
        first, second = self._batch(), self._batch()
        difference = find_difference(first, second)
        found = f"the same samples and seed gave batches that differ: {difference}"
        hint = "Draw from the generators of torch, NumPy or Python that a run seeds."
        raise_unless(difference is None, self.where, found, "the same batch to the bit", hint)
        drawn = [] if self.is_random else sorted(self._drawn_keys())
        found = f"{', '.join(map(repr, drawn))} differ from call to call"
        hint = "Set is_random = True if the collator is meant to draw."
        raise_unless(not drawn, self.where, found, "the same batch to the bit", hint)

    def test_samples_are_not_changed(self) -> None:
        """A data set in memory is not changed by collating its samples."""
        collator, given = self._built(), copy.deepcopy(list(self.samples))
        with reported_by("test_batch_is_a_dict_of_tensors"), seeded(0):
            collator(given)
        is_unchanged = len(given) == len(self.samples)
        raise_unless(is_unchanged, self.where, "the list of samples was changed", "no change")
        for index, (before, after) in enumerate(zip(self.samples, given, strict=True)):
            found = f"samples[{index}] was changed"
            is_unchanged = is_same_value(dict(before), dict(after))
            raise_unless(is_unchanged, self.where, found, "samples as they were", "Copy first.")

    def test_earlier_batch_stays_as_it_was(self) -> None:
        """A batch that is still held is not written over by the next one."""
        self._batch()
        collator = self._built()
        held = self.collate(self.samples, collator)
        before = {key: value.clone() for key, value in held.items()}
        for _ in range(3):
            self.collate(list(self.samples)[::-1], collator, seed=1)
        difference = find_difference(before, held)
        found = f"later batches changed an earlier one: {difference}"
        raise_unless(difference is None, self.where, found, "memory of its own for every batch")

    def test_collator_is_picklable(self) -> None:
        """A pickled and unpickled collator gives the same batch."""
        batch, collator = self._batch(), self._built()
        try:
            twin = pickle.loads(pickle.dumps(collator))
        except Exception as err:
            found = f"{type(collator).__name__} does not pickle: {type(err).__name__}: {err}"
            hint = "Keep functions made on the spot, open files and locks out of its attributes."
            expected = "a collator that travels to the loader's workers"
            raise ConformanceError(build_message(self.where, found, expected, hint)) from err
        self._check_same(batch, self.collate(self.samples, twin), "a pickled copy of the collator")

    def test_works_in_a_spawned_worker(self) -> None:
        """A worker process that shares nothing with this one gives the same batch."""
        batch, collator, samples = self._batch(), self._built(), list(self.samples)
        with reported_by("test_collator_is_picklable"):
            pickle.dumps(collator)
        try:
            pickle.dumps(samples)
        except Exception as err:
            found = f"they do not pickle: {type(err).__name__}: {err}"
            where = f"{type(self).__name__} samples"
            raise ConformanceError(build_message(where, found, "plain values")) from err
        loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]  # a list is a data set to a loader
            batch_size=len(samples),
            collate_fn=collator,
            num_workers=1,
            multiprocessing_context="spawn",
            timeout=_WORKER_TIMEOUT_S,
            generator=torch.Generator().manual_seed(0),
        )
        try:
            (found_batch,) = list(loader)
        except Exception as err:
            found = f"failed in a worker process: {type(err).__name__}: {err}"
            hint = "Its class must be at the top of a module that the worker can import."
            raise ConformanceError(build_message(self.where, found, action=hint)) from err
        ignored = self._drawn_keys()
        self._check_same(batch, found_batch, "a worker process", ignored)

    def test_empty_batch_is_refused(self) -> None:
        """No samples are an error that says so."""
        self._check_refusal([], "an empty list of samples")

    def test_disagreeing_keys_are_refused(self) -> None:
        """A key that not all samples have is an error that says so, and is not dropped."""
        batch = self._batch()
        kept = [key for key in self._own_keys() if key in batch]
        for key in kept:
            for index in (0, len(self.samples) - 1):
                samples = [dict(sample) for sample in self.samples]
                samples[index].pop(key, None)
                self._check_refusal(samples, f"a batch whose samples[{index}] lacks {key!r}")

    def test_device_transform_is_a_fixed_module(self) -> None:
        """The tensor half of preprocessing is a module that nothing would have to train."""
        transform = getattr(self._built(), "device_transform", None)
        if transform is None:
            raise unittest.SkipTest("the collator has no device_transform")
        found = f"device_transform is a {type(transform).__name__}, which a run does not call"
        raise_unless(isinstance(transform, nn.Module), self.where, found, "an nn.Module")
        trained = [name for name, p in transform.named_parameters() if p.requires_grad]
        found = f"device_transform has the trainable parameters {', '.join(trained)}"
        hint = "No optimizer gets them: make them buffers, or a part of the model."
        raise_unless(not trained, self.where, found, "none", hint)

    def test_device_transform_is_rebuilt_from_its_config(self) -> None:
        """`type(m)(**m.config)` is `m`, also after `config` went through a file."""
        transform, pixels = self._transform()
        where = f"{self.where} device_transform.config"
        try:
            config = json.loads(json.dumps(dict(transform.config)))
            twin = type(transform)(**config).eval()
            output = twin(pixels.clone())
        except Exception as err:
            found = f"builds no module: {type(err).__name__}: {err}"
            expected = "a JSON-able mapping of the arguments of its class"
            raise ConformanceError(build_message(where, found, expected)) from err
        is_same = is_equal(transform(pixels.clone()), output)
        found = f"{type(transform).__name__}(**{config}) gives another output"
        raise_unless(is_same, where, found, "arguments that build an equal module")

    def test_device_transform_gives_finite_rows(self) -> None:
        """Its output is finite, has a row per sample, and is the same for a sample alone."""
        transform, pixels = self._transform()
        where = f"{self.where} device_transform"
        output = transform(pixels.clone())
        is_batch = isinstance(output, Tensor) and output.shape[:1] == pixels.shape[:1]
        raise_unless(is_batch, where, "gives no row per sample", "a tensor (batch, ...)")
        is_finite = not output.is_floating_point() or bool(output.isfinite().all())
        raise_unless(is_finite, where, "gives NaN or infinity", "finite numbers")
        for row in range(len(pixels)):
            alone = transform(pixels[row : row + 1].clone())
            found = f"row {row} differs alone and in a batch"
            raise_unless(is_close(alone[0], output[row]), where, found, "the same output")

    def _transform(self) -> tuple[Any, Tensor]:
        """Return the module as a run calls it, and the tensor it is for."""
        with reported_by("test_device_transform_is_a_fixed_module"):
            self.test_device_transform_is_a_fixed_module()
        name, batch = primary_input(self.task), self._batch()
        if name not in batch:
            found = f"the batch lacks {name!r}, the task's first input"
            hint = "Set task to one with inputs, or with a modality whose input is known."
            where = f"{self.where} device_transform"
            raise ConformanceError(build_message(where, found, action=hint))
        collator: Any = self._built()
        return collator.device_transform.eval(), batch[name]
