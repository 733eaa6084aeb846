"""What is built and installed: the wheel, its metadata, and a plugin of somebody else."""

from __future__ import annotations

import email
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dovetail
import dovetail_plugins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TOX_ENV = os.environ.get("DOVETAIL_TOX_ENV", "")
EXTRAS = {
    "all",
    "examples",
    "onnx",
    "report",
    "tensorboard",
    "testing",
    "text",
    "torchserve",
    "vision",
    "wandb",
}

TALLY = '''
"""Stacks numbers and adds an offset."""

from __future__ import annotations

import torch

from dovetail import PluginOptions, hookimpl

dovetail_api = 1


class Options(PluginOptions):
    offset: float = 0.0
    """Added to every number."""


class Tally:
    def __init__(self, offset):
        self.offset = offset

    def __call__(self, samples):
        features = torch.stack([sample["features"] for sample in samples]) + self.offset
        return {"features": features, "labels": torch.tensor([s["labels"] for s in samples])}


@hookimpl
def dovetail_collate(options: Options):
    return Tally(options.offset)
'''

TOY = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, features):
        assert features.min() >= 100, "the collator's offset is missing"
        return self.layer(features - 100)


def build_model():
    return Model()


def load_splits():
    samples = [{"features": torch.rand(3), "labels": i % 2} for i in range(24)]
    return {"train": samples[:16], "validation": samples[16:]}
"""

CONFIG = """
[run]
name = "toy"
dir = "runs"

[model]
factory = "toy:build_model"

[data]
factory = "toy:load_splits"

[task]
modality = "tabular"
num_classes = 2

[train]
epochs = 1
batch_size = 8

[collate]
use = "tally"

[collate.tally]
offset = 100.0
"""


def build(target: str, source: Path, out: Path) -> Path:
    """Build one distribution of `source` with the installed hatchling; the tree stays clean."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    (name,) = (n for n in wheel if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel[name])


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def declared(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def of_extra(metadata: Message, extra: str) -> dict[str, str]:
    """Return name and specifier of what an extra adds to the base."""
    return {
        r.name: str(r.specifier)
        for r in declared(metadata)
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    }


def test_wheel_holds_both_packages_and_nothing_else(wheel: dict[str, bytes]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {
        "dovetail",
        "dovetail_plugins",
        f"dovetail-{dovetail.__version__}.dist-info",
    }
    assert not [n for n in wheel if "__pycache__" in n or n.endswith((".pyc", ".orig", ".rej"))]
    assert {"dovetail/py.typed", "dovetail_plugins/py.typed"} <= set(wheel)


def test_wheel_holds_every_file_of_both_packages(wheel: dict[str, bytes]) -> None:
    tracked = {
        path.relative_to(root).as_posix()
        for root in (ROOT / "core", ROOT / "plugins")
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked == {name for name in wheel if ".dist-info/" not in name}


def test_wheel_from_sdist_equals_wheel_from_tree(
    sdist: Path, wheel: dict[str, bytes], tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        # The first releases of 3.10 have no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    rebuilt = contents(build("wheel", source, tmp_path / "wheel"))
    assert rebuilt == wheel


def test_sdist_holds_what_its_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tox.ini", ".ci/run"} <= names
    assert {"tests/conftest.py", "tests/integration/test_packaging.py"} <= names
    assert not [n for n in names if n.startswith((".tox", ".git/", "runs/", "contrib/"))]


def test_metadata_names_licence_and_version(metadata: Message, wheel: dict[str, bytes]) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == dovetail.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    (licence,) = (text for name, text in wheel.items() if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in licence
    assert b"END OF TERMS AND CONDITIONS" in licence


def test_metadata_installed_is_that_of_the_sources(metadata: Message) -> None:
    installed = importlib.metadata.metadata("dovetail")
    for field in ("Version", "Requires-Dist", "Provides-Extra", "License-Expression"):
        assert installed.get_all(field) == metadata.get_all(field), (
            f"{field} differs: install dovetail again after a change of pyproject.toml"
        )


def test_metadata_extras_are_the_documented_ones(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_extra_all_holds_what_runs_need_but_torchserve(metadata: Message) -> None:
    wanted: dict[str, str] = {}
    for extra in EXTRAS - {"all", "testing", "torchserve"}:
        wanted |= of_extra(metadata, extra)
    assert of_extra(metadata, "all") == wanted
    assert not set(of_extra(metadata, "torchserve")) & set(wanted)


def test_requirements_have_floors_and_no_caps(metadata: Message) -> None:
    for requirement in declared(metadata):
        operators = {specifier.operator for specifier in requirement.specifier}
        # pluggy is the one whose next major version changes the contract with plugins.
        expected = {">=", "<"} if requirement.name == "pluggy" else {">="}
        assert operators == expected, str(requirement)


def test_entry_points_resolve_inside_the_wheel(wheel: dict[str, bytes]) -> None:
    (name,) = (n for n in wheel if n.endswith(".dist-info/entry_points.txt"))
    installed = importlib.metadata.distribution("dovetail").entry_points
    for entry in installed:
        assert f"{entry.name} = {entry.value}" in wheel[name].decode(), entry
        path = entry.module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & set(wheel), entry
        plugin = entry.load()
        if entry.group.startswith("dovetail."):
            hook = entry.group.replace(".", "_")
            assert callable(getattr(plugin, hook)), entry


def test_plugin_modules_are_all_offered(wheel: dict[str, bytes]) -> None:
    """Every module with an implementation of a hook stands in its entry-point group."""
    entries = importlib.metadata.distribution("dovetail").entry_points
    offered = {(e.group, e.module) for e in entries}
    for hook in ("compile", "collate", "accumulate", "log", "export"):
        for name, text in wheel.items():
            if not name.startswith(f"dovetail_plugins/{hook}/"):
                continue
            if f"\ndef dovetail_{hook}(" in text.decode():
                module = name.removesuffix(".py").replace("/", ".")
                assert (f"dovetail.{hook}", module) in offered


@pytest.mark.skipif(not TOX_ENV, reason="only tox promises that the wheel is tested")
def test_packages_come_from_the_wheel_under_tox() -> None:
    site = Path(sysconfig.get_path("purelib")).resolve()
    for package in (dovetail, dovetail_plugins):
        assert site in Path(str(package.__file__)).resolve().parents
    roots = {(ROOT / "core").resolve(), (ROOT / "plugins").resolve()}
    assert not roots & {Path(entry).resolve() for entry in sys.path}


@pytest.mark.skipif(TOX_ENV != "lowest", reason="only that environment holds the floors")
def test_lowest_environment_holds_each_floor(metadata: Message) -> None:
    above = {}
    for requirement in declared(metadata):
        marker = requirement.marker
        if marker and not marker.evaluate({"extra": "all"}):
            continue
        (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
        installed = Version(importlib.metadata.version(requirement.name))
        # A local part such as `+cpu` names a build of the same release.
        if Version(installed.public) != Version(floor):
            above[requirement.name] = f"{installed}, floor {floor}"
    assert not above


def test_ci_runs_the_test_command_of_the_readme(tmp_path: Path) -> None:
    """`.ci/run` takes the command from README.md, so that the two cannot drift apart."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.count("<!-- test-command -->") == 1
    start = lines.index("<!-- test-command -->") + 1
    block = [line for line in lines[start:] if line]
    assert block[0].startswith("```")
    command = block[1 : block.index("```", 1)]
    assert len(command) == 1
    assert "tox" in command[0]


@pytest.mark.slow
def test_stranger_plugin_trains_when_installed_and_named(
    plugin_wheel: Callable[..., Path], plugin_environment: Callable[..., Path], tmp_path: Path
) -> None:
    python = plugin_environment(plugin_wheel("tally", TALLY))
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.toml").write_text(CONFIG)

    def run(*arguments: str) -> str:
        command = [str(python), "-m", "dovetail", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    listing = run("plugins")
    assert "tally" in listing
    assert "dovetail-tally" in listing
    run("train", "toy.toml")
    (lock,) = (tmp_path / "runs").rglob("plugins.lock.json")
    used = json.loads(lock.read_text())
    assert "dovetail-tally" in json.dumps(used)
    assert "1.2.3" in json.dumps(used)
