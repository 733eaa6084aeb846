from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dovetail.testing import ConformanceError, ExporterSuite
from dovetail.testing.exporter.closure import find_closure, find_fault, list_modules

pytest.importorskip("torch")

TOY = '''
"""Writes the suite's own models as arrays that NumPy runs, with a fault where options ask."""

import json
import pickle
from pathlib import Path

import numpy as np

from dovetail import PluginOptions, hookimpl
from dovetail.types import Artifact

dovetail_api = 1
last, wear = None, []

RUNTIME = """
import json
import os

import numpy as np


def load(path):
    with open(path) as file:
        known = json.load(file)
    with np.load(os.path.join(os.path.dirname(path), known["weights"])) as file:
        weights = {name: file[name] for name in file.files}
    run = run_vision if "conv.weight" in weights else run_text
    return lambda inputs: dict(zip(known["outputs"], run(weights, known, **inputs)))


def run_vision(w, known, pixel_values):
    x = np.pad(pixel_values.astype(np.float32) / 255 * 2 - 1, ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    y = np.einsum("bchwij,kcij->bkhw", seen, w["conv.weight"])
    y = y + w["conv.bias"][:, None, None]
    by = w["norm.weight"] / np.sqrt(w["norm.running_var"] + 1e-5)
    to = w["norm.bias"] - by * w["norm.running_mean"]
    y = np.maximum(y * by[:, None, None] + to[:, None, None], 0)
    size = known["batch"] if known["is_fixed"] else len(y)
    y = y.reshape(size, 4, 4, 2, 4, 2).max((3, 5)).reshape(size, -1)
    return (y @ w["head.weight"].T + w["head.bias"],)


def run_text(w, known, input_ids, attention_mask):
    if not known["has_mask"]:
        attention_mask = np.ones_like(attention_mask)
    x = w["embed.weight"][input_ids]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    y = y * w["norm.weight"] + w["norm.bias"]
    q, k, v = np.split(y @ w["qkv.weight"].T + w["qkv.bias"], 3, -1)
    s = np.where(attention_mask[:, None, :] == 0, -1e9, q @ k.transpose(0, 2, 1) / 8**0.5)
    s = np.exp(s - s.max(-1, keepdims=True))
    x = x + (s / s.sum(-1, keepdims=True)) @ v
    n = attention_mask.sum(1)
    pooled = (x * attention_mask[:, :, None]).sum(1) / n[:, None]
    logits = pooled.astype(np.float32) @ w["head.weight"].T + w["head.bias"]
    return logits, n.astype(known["count"])
"""
exec(RUNTIME)


class Options(PluginOptions):
    fault: str = ""


class Exporter:
    def __init__(self, fault):
        self.fault = fault
        self.requirements = ("numpy>=1.26",)
        self.carries_code = False
        if fault == "requires without floors":
            self.requirements = ("numpy",)
        if fault == "requires what is no requirement":
            self.requirements = ("numpy>=1.26", "the newest numpy")
        if fault == "requires a list":
            self.requirements = ["numpy>=1.26"]
        if fault == "does not say whether it carries code":
            self.carries_code = None
        if fault == "unpickles and says so":
            self.carries_code = True
        if fault == "has no source":
            self.runtime_source = None

    def export(self, model, inputs, directory):
        fault, trained = self.fault, model.get_submodule("model")
        state = trained.state_dict()
        weights = {name: value.numpy().copy() for name, value in state.items()}
        if fault == "rounds the weights":
            weights = {n: w.astype(np.float16).astype(w.dtype) for n, w in weights.items()}
        if fault == "is left to chance":
            # Far from zero and from each other, however the draws fall.
            wear.append(len(wear))
            chance = len(wear) + np.random.default_rng().uniform(0, 0.1)
            weights["head.bias"] += np.float32(1e-3 * chance)
        if fault == "wears out":
            wear.append(len(wear))
            weights["head.bias"] += 1e-3 * (len(wear) > 2)  # after one export of each model
        if fault == "leaves training mode on":
            model.train()
        if fault == "changes a weight":
            next(model.parameters()).data.flatten()[0] += 1e-6
        if fault == "leaves a hook":
            trained.head.register_forward_hook(lambda *args: None)
        if fault == "moves the weights":
            trained.head.bias.data = trained.head.bias.data.clone()
        if fault == "freezes the weights":
            model.requires_grad_(False)
        if fault == "replaces forward":
            trained.forward = trained.forward
        beside = directory.parent if fault == "writes outside" else directory
        store = "weights:1.npz" if fault == "has a name no bundle takes" else "weights.npz"
        np.savez(beside / store, **weights)
        if fault == "writes outside":
            np.savez(directory / store, **weights)
        if fault == "leaves a file":
            (directory / "export.log").write_text("done")
        if fault == "links":
            (directory / "link").symlink_to(store)
        known = {
            "weights": store,
            "outputs": list(inputs.output_names),
            "batch": len(next(iter(inputs.tensors.values()))),
            "is_fixed": fault == "fixes the batch size",
            "has_mask": fault != "ignores the mask",
            "count": "int32" if fault == "changes a type" else "int64",
        }
        if fault == "renames an output":
            known["outputs"][0] = "output_0"
        main = directory / "model.json"
        main.write_text(json.dumps(known))
        files = [main, directory / store]
        files += [directory / "link"] if fault == "links" else []
        if fault == "forgets its main file":
            files = files[1:]
        if fault == "names what is not there":
            files.append(directory / "labels.txt")
        metadata = {"weights": store}
        if fault == "has metadata of its own":
            metadata["main"] = main
        if fault == "has infinite metadata":
            metadata["limit"] = float("inf")
        name = None if fault == "has no name" else "arrays"
        return Artifact(name, main, tuple(files), metadata)

    def load(self, path):
        global last
        if self.fault.startswith("unpickles") and "arrays" not in self.fault:
            try:
                return pickle.loads(path.read_bytes())
            except Exception:
                pass
        if self.fault == "executes":
            try:
                exec(path.read_text())
            except Exception:
                pass
        if self.fault == "unpickles arrays":
            for file in path.parent.iterdir():
                try:
                    np.load(file, allow_pickle=True)
                except Exception:
                    pass
        if self.fault == "needs what it does not name":
            import safetensors
        try:
            runner = load(str(path))
        except Exception:
            if self.fault == "falls back on memory":
                return last
            raise
        last = runner
        if self.fault == "rounds the outputs":
            return lambda inputs: {
                n: np.round(a, 3) if a.dtype.kind == "f" else a for n, a in runner(inputs).items()
            }
        return runner

    def runtime_source(self):
        if self.fault == "has a source that needs more":
            return "import safetensors\\n" + RUNTIME
        if self.fault == "has a source of another model":
            return RUNTIME.replace("/ 255", "/ 256")
        if self.fault == "has a source that needs dovetail":
            return "from dovetail_toy import load\\n" + RUNTIME
        return RUNTIME


@hookimpl
def dovetail_export(options: Options):
    return Exporter(options.fault)
'''

FILES = "export_names_all_its_files"
METADATA = "metadata_are_plain"
UNCHANGED = "the_model_comes_back_unchanged"
NAMES = "outputs_have_their_names_and_types"
SIZES = "outputs_agree_at_every_batch_size_and_length"
PADDING = "outputs_agree_with_padding"
TWICE = "exporting_twice_gives_the_same_outputs"
FLOORS = "requirements_have_floors"
CODE = "it_says_whether_it_carries_code"
PLANTED = "nothing_planted_is_executed"
DAMAGED = "a_damaged_artifact_is_refused"
BUNDLE = "a_bundle_notices_one_changed_byte"
APART = "it_runs_where_only_its_requirements_are"

FAULTS: dict[str, set[str]] = {
    "leaves a file": {FILES},
    "writes outside": {FILES},
    "names what is not there": {FILES},
    "links": {FILES},
    "forgets its main file": {FILES},
    "has metadata of its own": {METADATA},
    "has no name": {METADATA},
    "has infinite metadata": {METADATA},
    "leaves training mode on": {UNCHANGED},
    "changes a weight": {UNCHANGED},
    "leaves a hook": {UNCHANGED},
    "moves the weights": {UNCHANGED},
    "freezes the weights": {UNCHANGED},
    "replaces forward": {UNCHANGED},
    "changes a type": {NAMES},
    "fixes the batch size": {SIZES},
    "ignores the mask": {PADDING},
    "requires without floors": {FLOORS},
    "requires what is no requirement": {FLOORS},
    "requires a list": {FLOORS},
    "unpickles": {PLANTED},
    "unpickles arrays": {PLANTED},
    "executes": {PLANTED},
    "falls back on memory": {DAMAGED},
    "has a name no bundle takes": {BUNDLE},
    "has a source that needs more": {APART},
    "has a source that needs dovetail": {APART},
    "has a source of another model": {APART},
    "does not say whether it carries code": {CODE},
    "wears out": {TWICE},
    # A process of its own compares names and values too.
    "renames an output": {NAMES, APART},
    "rounds the outputs": {SIZES, PADDING},
    "rounds the weights": {SIZES, PADDING, APART},
    "is left to chance": {TWICE, SIZES, PADDING, APART},
}
"""Faults of an exporter, and the checks that report each, and no other."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_array_exporter.py").write_text(TOY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("toy_array_exporter")
    sys.modules.pop("toy_array_exporter", None)


def failures_of(toy: ModuleType, fault: str, **attributes: Any) -> dict[str, str]:
    """Run every check against the toy with a fault; return the reasons of those that fail."""
    given = {"plugin": toy, "options": {"fault": fault}, **attributes}
    return dict(type("Suite", (ExporterSuite,), given)().failures())


def test_a_right_exporter_passes_every_check(toy: ModuleType) -> None:
    ExporterSuite.check(plugin=toy)
    assert len(ExporterSuite.checks()) == 13


@pytest.mark.parametrize(("fault", "checks"), FAULTS.items())
def test_a_fault_is_reported_by_its_checks_alone(
    toy: ModuleType, fault: str, checks: set[str]
) -> None:
    failures = failures_of(toy, fault)
    assert set(failures) == checks, failures
    assert all(failures.values())


def test_a_format_of_low_precision_states_its_tolerance(toy: ModuleType) -> None:
    assert not failures_of(toy, "rounds the weights", tolerance=1e-2)


def test_an_exporter_without_a_source_is_loaded_with_dovetail_around(toy: ModuleType) -> None:
    try:
        importlib.metadata.distribution("dovetail")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dovetail is importable here, but not installed")
    suite = type("Suite", (ExporterSuite,), {"plugin": toy, "options": {"fault": "has no source"}})
    described = suite()._describe_process()
    assert described["source"] is None
    assert {"dovetail", "numpy", "pydantic"} <= set(described["names"])
    assert {"dovetail", "pydantic_core", "toy_array_exporter"} <= set(described["modules"])
    assert "pytest" not in described["modules"]
    suite().test_it_runs_where_only_its_requirements_are()


def test_an_exporter_that_says_that_it_executes_code_may(toy: ModuleType) -> None:
    assert not failures_of(toy, "unpickles and says so")


def test_modalities_narrow_the_models(toy: ModuleType) -> None:
    failures = failures_of(toy, "ignores the mask", modalities=("vision",))
    assert not failures


def test_an_exporter_that_raises_fails_with_its_own_reason(toy: ModuleType) -> None:
    class Refusing:
        """Refuses every model."""

        @staticmethod
        def dovetail_export() -> Any:
            raise ValueError("no format today")

    Refusing.dovetail_export = staticmethod(  # type: ignore[method-assign]
        importlib.import_module("dovetail").hookimpl(Refusing.dovetail_export)
    )
    with pytest.raises(ConformanceError, match="ValueError: no format today"):
        ExporterSuite.check(plugin=Refusing())


@pytest.mark.parametrize(
    ("requirement", "fault"),
    [
        ("numpy>=1.26", ""),
        ("numpy >= 1.26, < 3", ""),
        ("torch~=2.7", ""),
        ("pkg[extra,more]==1.0; python_version < '3.11'", ""),
        ("numpy", "has no lowest version"),
        ("numpy<2", "has no lowest version"),
        ("numpy>=", "is no requirement"),
        ("the newest numpy", "is no requirement"),
        ("", "is no requirement"),
        (3, "is no requirement"),
    ],
)
def test_find_fault_knows_requirements_with_floors(requirement: object, fault: str) -> None:
    assert find_fault(requirement) == fault


def test_closure_follows_requirements_and_leaves_extras_out() -> None:
    found = find_closure(["pydantic[email]>=2"])
    assert {"pydantic", "pydantic-core", "typing-extensions"} <= found
    assert "email-validator" not in found
    assert find_closure(["there-is-no-such-thing>=1"]) == {"there-is-no-such-thing"}


def test_modules_of_installed_distributions_are_found() -> None:
    assert {"_pytest", "pytest"} <= list_modules(["pytest"])
    assert {"pydantic", "pydantic_core"} <= list_modules(["pydantic", "pydantic-core"])
    assert list_modules(["there-is-no-such-thing"]) == set()


def test_modules_of_a_distribution_without_a_list_of_files(site: Any) -> None:
    site.add("toy-dist", {"dovetail.export": {"toy": "toy_exports.arrays:plugin"}})
    assert list_modules(["toy-dist"]) == {"toy_dist", "toy_exports"}


def test_modules_of_an_editable_distribution(site: Any, tmp_path: Path) -> None:
    (tmp_path / "src" / "edited_package").mkdir(parents=True)
    (tmp_path / "src" / "edited.py").touch()
    site.add("edited-dist", {})
    (site.path / "edited.pth").write_text(f"# a comment\nimport sys\n{tmp_path / 'src'}\n")
    (site.path / "edited_dist-1.2.dist-info" / "RECORD").write_text("edited.pth,,\n")
    assert {"edited", "edited_package"} <= list_modules(["edited-dist"])
