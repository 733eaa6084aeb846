from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from dovetail import hookimpl
from dovetail.registry import Registry
from dovetail.testing.training import merge

ROOT = Path(__file__).resolve().parents[3]

AUTHORS_TESTS = """
import unittest

import pytest

from dovetail.testing import CollatorSuite, Suite
from dovetail.testing.suite import expect


class Doubling:
    def __init__(self):
        self.scale = 2


class TestToy(Suite):
    hook = "wrap"

    def test_passes(self):
        expect(True, "")

    def test_fails(self):
        expect(False, "the reason")

    def test_skips(self):
        raise unittest.SkipTest("not here")


def test_fixture(dovetail_run):
    assert dovetail_run.directory.is_dir()
"""


class Doubling:
    """Collates features, doubled."""

    calls = 0

    @hookimpl
    def dovetail_collate(self):
        return self

    def __call__(self, samples):
        self.calls += 1
        features = torch.stack([sample["features"] for sample in samples])
        labels = torch.tensor([sample["labels"] for sample in samples])
        return {"features": features * 2, "labels": labels}


def test_registry_is_fresh(dovetail_registry) -> None:
    assert isinstance(dovetail_registry, Registry)
    assert "doubling" not in [plugin.name for plugin in dovetail_registry.list_plugins("collate")]


def test_run_has_an_empty_folder(dovetail_run, tmp_path) -> None:
    assert dovetail_run.directory.parent == tmp_path
    assert list(dovetail_run.directory.iterdir()) == []


def test_train_really_trains(dovetail_train, tmp_path) -> None:
    result = dovetail_train()
    assert (result.status, result.num_steps) == ("completed", 3)
    assert result.run_dir.is_relative_to(tmp_path)
    assert result.final_metrics.keys() >= {"train/loss", "val/loss", "val/accuracy"}


def test_train_takes_tables_on_top_of_its_own(dovetail_train) -> None:
    result = dovetail_train({"train": {"batch_size": 4}}, accumulate={"exact": {"steps": 3}})
    assert result.num_steps == 2
    again = dovetail_train({"train": {"batch_size": 4}}, accumulate={"exact": {"steps": 3}})
    assert again.final_metrics == result.final_metrics
    assert again.run_dir != result.run_dir


def test_train_finds_a_plugin_of_the_test(dovetail_train, dovetail_registry) -> None:
    plugin = Doubling()
    dovetail_registry.register(plugin, hook="collate", name="doubling")
    dovetail_train({"collate": {"use": "doubling"}})
    assert plugin.calls > 3


def test_train_takes_a_model_and_data(dovetail_train) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    samples = [{"x": torch.ones(2) * i, "labels": i % 2} for i in range(6)]
    result = dovetail_train(model=model, data=samples, train={"batch_size": 3})
    assert result.num_steps == 2
    assert not torch.equal(model.weight, before)


def test_merge_lays_tables_into_tables() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, {"a": {"c": {"f": 4}}, "e": {"g": 5}}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}},
        "e": {"g": 5},
    }
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_plugin_is_declared() -> None:
    (entry,) = importlib.metadata.entry_points(group="pytest11", name="dovetail")
    assert entry.value == "dovetail.testing.pytest_plugin"


def test_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import dovetail.testing.pytest_plugin; "
        "print(sorted(name for name in set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(found.stdout) == [
        "dovetail",
        "dovetail._version",
        "dovetail.testing",
        "dovetail.testing.pytest_plugin",
    ]


def run_pytest(python: Path | str, folder: Path) -> str:
    # The options stand here, as a project of its own has none of ours.
    arguments = ("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-rA", "-c", "none.ini")
    (folder / "none.ini").write_text("[pytest]\n")
    (folder / "test_toy.py").write_text(AUTHORS_TESTS)
    result = subprocess.run(
        [str(python), *arguments, str(folder / "test_toy.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout + result.stderr


def check_outcome(output: str) -> None:
    assert "PASSED test_toy.py::TestToy::test_passes" in output, output
    assert "PASSED test_toy.py::test_fixture" in output
    assert "ConformanceError: the reason" in output
    assert "1 failed, 2 passed, 1 skipped" in output
    assert "Warning" not in output


def test_plugin_works_in_a_project_of_its_own(tmp_path) -> None:
    check_outcome(run_pytest(sys.executable, tmp_path))
