from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dovetail import TaskSpec
from dovetail.testing import CollatorSuite, ConformanceError

SAMPLES = [
    {"features": torch.arange(3.0) + i, "tokens": [5, 6, 7][: i + 1], "weight": w, "labels": i}
    for i, w in enumerate([0.5, 2.0, 1.25])
]


@pytest.fixture
def toys(monkeypatch):
    """The module of toy collators, where a spawned worker finds it too."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).with_name("toys")), *sys.path])
    yield importlib.import_module("toy_collators")
    sys.modules.pop("toy_collators", None)


@pytest.fixture
def failures(toys):
    """Names of the checks that fail for a collator; only where asked is a worker started."""

    def collect(make, *, has_worker=False, **attributes):
        attributes = {"plugin": toys.Plugin(make), "samples": SAMPLES, **attributes}
        if not has_worker:
            attributes["test_works_in_a_spawned_worker"] = None
        suite = type("Toy", (CollatorSuite,), attributes)()
        return dict(suite.failures())

    return collect


def test_suite_passes_a_right_collator(toys) -> None:
    CollatorSuite.check(plugin=toys.Plugin(toys.Padding), samples=SAMPLES)


def test_suite_passes_padding_on_the_left(failures, toys) -> None:
    assert failures(toys.PaddingOnTheLeft) == {}


def test_suite_passes_a_collator_without_device_transform(failures, toys) -> None:
    assert failures(lambda: toys.Padding(device_transform=None)) == {}


def test_suite_passes_a_random_collator_that_says_so(failures, toys) -> None:
    assert failures(toys.Masking, is_random=True) == {}
    assert failures(toys.Masking).keys() == {"same_samples_give_the_same_batch"}


def test_suite_passes_what_stands_for_the_whole_batch_when_it_is_named(failures, toys) -> None:
    assert failures(toys.Averages, whole_batch_keys=["mean"]) == {}


def test_suite_passes_a_consumed_key_when_it_is_named(failures, toys) -> None:
    assert failures(toys.DropsWeight, consumed_keys=["weight"]) == {}


def test_suite_passes_a_closed_set_of_keys_when_no_key_is_added(failures, toys) -> None:
    assert failures(toys.DropsUnknown, extra_key=None) == {}


FAULTS = {
    "GivesList": "batch_is_a_dict_of_tensors",
    "GivesPlainLabels": "batch_is_a_dict_of_tensors",
    "Averages": "tensors_have_a_row_per_sample",
    "CountsSamples": "tensors_have_a_row_per_sample",
    "Squeezes": "single_sample_is_a_batch_of_one",
    "DropsWeight": "every_key_is_kept",
    "DropsUnknown": "unknown_key_is_kept",
    "Sorts": "order_is_kept",
    "Reverses": "order_is_kept",
    "NormalizesOverBatch": "row_does_not_depend_on_its_batch",
    "GuessesDtype": "dtypes_do_not_depend_on_the_batch",
    "GivesFloat64": "dtypes_fit_the_samples",
    "GivesFloatLabels": "dtypes_fit_the_samples",
    "GivesInt32Labels": "dtypes_fit_the_samples",
    "AddsNoise": "same_samples_give_the_same_batch",
    "Counts": "same_samples_give_the_same_batch",
    "DrawsFromTheSystem": "same_samples_give_the_same_batch",
    "ChangesSamples": "samples_are_not_changed",
    "ReusesMemory": "earlier_batch_stays_as_it_was",
    "IndexesEmpty": "empty_batch_is_refused",
    "KeepsCommonKeys": "disagreeing_keys_are_refused",
    "LacksKeys": "disagreeing_keys_are_refused",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_suite_reports_a_seeded_fault_by_its_check(failures, toys, fault) -> None:
    found = failures(getattr(toys, fault))
    assert found.keys() == {FAULTS[fault]}, found


TRANSFORM_FAULTS = {
    "Trained": "device_transform_is_a_fixed_module",
    "Forgetful": "device_transform_is_rebuilt_from_its_config",
    "Unwritable": "device_transform_is_rebuilt_from_its_config",
    "Infinite": "device_transform_gives_finite_rows",
    "Centers": "device_transform_gives_finite_rows",
}


@pytest.mark.parametrize("fault", TRANSFORM_FAULTS)
def test_suite_reports_a_faulty_device_transform(failures, toys, fault) -> None:
    module = getattr(toys, fault)(0.5)
    found = failures(lambda: toys.Padding(device_transform=module))
    assert found.keys() == {TRANSFORM_FAULTS[fault]}, found


def test_suite_reports_a_device_transform_that_is_no_module(failures, toys) -> None:
    found = failures(lambda: toys.Padding(device_transform=torch.square))
    assert found.keys() == {"device_transform_is_a_fixed_module"}
    assert "which a run does not call; expected an nn.Module" in str(found)


def test_suite_reports_a_collator_that_does_not_pickle(failures, toys) -> None:
    found = failures(lambda: toys.Padding(key=lambda: 0), has_worker=True)
    assert found.keys() == {"collator_is_picklable"}
    assert "Padding does not pickle" in found["collator_is_picklable"]


def test_suite_reports_a_collator_that_differs_in_a_worker(failures, toys) -> None:
    found = failures(toys.DiffersInWorker, has_worker=True)
    assert found.keys() == {"works_in_a_spawned_worker"}
    assert "a worker process gave another batch: the values of 'features'" in str(found)


def test_suite_reports_a_collator_that_a_worker_cannot_import(failures, toys, capfd) -> None:
    sys.path.remove(str(Path(__file__).with_name("toys")))
    found = failures(toys.Padding, has_worker=True)
    assert found.keys() == {"works_in_a_spawned_worker"}
    assert "at the top of a module that the worker can import" in str(found)
    assert "No module named 'toy_collators'" in capfd.readouterr().err


def test_suite_reports_a_hook_without_a_collator(failures) -> None:
    found = failures(lambda: None)
    assert found.keys() == {"hook_makes_a_collator"}
    assert "answered None" in found["hook_makes_a_collator"]


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([], "got 0; expected at least two different samples"),
        (SAMPLES[:1], "got 1; expected at least two different samples"),
        ([SAMPLES[0], dict(SAMPLES[0])], "all samples are equal"),
        ([1, 2], "got int, int; expected mappings"),
    ],
)
def test_suite_reports_samples_it_cannot_work_with(failures, toys, samples, reason) -> None:
    found = failures(toys.Padding, samples=samples)
    assert found.keys() == {"hook_makes_a_collator"}
    assert reason in found["hook_makes_a_collator"]


FRACTIONS = [{**sample, "labels": 0.5 * i} for i, sample in enumerate(SAMPLES)]


def test_suite_reports_fractions_that_became_whole_numbers(failures, toys) -> None:
    assert failures(toys.Padding, samples=FRACTIONS) == {}
    found = failures(toys.TruncatesLabels, samples=FRACTIONS)
    assert found.keys() == {"dtypes_fit_the_samples"}


def test_suite_takes_float_labels_for_a_regression(failures, toys) -> None:
    task = TaskSpec(kind="regression")
    assert failures(toys.GivesFloatLabels, task=task) == {}


def test_suite_takes_float64_that_is_the_samples_own(failures, toys) -> None:
    samples = [{**s, "weight": torch.tensor(s["weight"]).double()} for s in SAMPLES]
    assert failures(toys.Padding, samples=samples) == {}


def test_suite_names_every_failed_check_in_one_error(toys) -> None:
    with pytest.raises(ConformanceError) as caught:
        CollatorSuite.check(
            plugin=toys.Plugin(toys.IndexesEmpty),
            samples=SAMPLES,
            test_works_in_a_spawned_worker=None,
        )
    head, line = str(caught.value).splitlines()
    assert head == "under-test: 1 of 19 checks failed"
    assert line == (
        "  - empty_batch_is_refused: plugin 'under-test' hook dovetail_collate: an empty list of "
        "samples raised IndexError: list index out of range; expected a DataError, or another "
        "ValueError, that says what is wrong."
    )
