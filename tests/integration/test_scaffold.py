"""A new plugin of each hook: built, installed, tested by its own tests, listed, used by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.registry import Role
from dovetail.scaffold import PluginNames, config_example, write_plugin

NAMES: dict[str, Role] = {
    "swift": "compile",
    "scaled": "collate",
    "window": "accumulate",
    "rows": "log",
    "graph": "export",
    "timed": "wrap",
}

TOY = """
import logging

import torch
from torch import nn

logging.basicConfig(level="INFO", format="%(name)s: %(message)s")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features):
        return self.layer(features)


def build_model():
    return Model()


def load_splits():
    samples = [{"features": torch.rand(3), "labels": i % 2} for i in range(24)]
    return {"train": samples[:16], "validation": samples[16:]}
"""

CONFIG = """
[model]
factory = "toy:build_model"

[data]
factory = "toy:load_splits"

[task]
modality = "tabular"
num_classes = 2

[train]
batch_size = 4
device = "cpu"
"""

EACH_COMMAND = """
import sys
from dovetail.cli import main

for line in sys.stdin.read().splitlines():
    print("$", line)
    try:
        main(line.split())
    except SystemExit as err:
        assert not err.code, line
"""


class Installed:
    """Six new plugins in one environment."""

    def __init__(self, projects: dict[str, Path], python: Path) -> None:
        self.projects = projects
        self.python = python

    def run(self, *arguments: str, cwd: Path, text: str = "") -> str:
        """Return what the environment's interpreter printed, errors and logs too."""
        result = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout


@pytest.fixture(scope="module")
def shared() -> dict[str, Installed]:
    """What the first test of this file makes, for the others."""
    return {}


@pytest.fixture
def plugins(
    shared: dict[str, Installed],
    plugin_environment: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Installed:
    """Six new plugins, each built into a wheel, and all installed into one environment."""
    if not shared:
        parent = tmp_path_factory.mktemp("scaffold")
        projects = {name: write_plugin(name, hook, parent) for name, hook in NAMES.items()}
        for project in projects.values():
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
            subprocess.run(command, cwd=project, check=True, capture_output=True)
        wheels = [next(project.glob("dist/*.whl")) for project in projects.values()]
        shared["installed"] = Installed(projects, plugin_environment(*wheels))
    return shared["installed"]


@pytest.mark.slow
def test_new_plugins_are_listed_and_shown(plugins: Installed, tmp_path: Path) -> None:
    commands = ["plugins --check", *(f"plugins show {name}" for name in NAMES)]
    printed = plugins.run("-c", EACH_COMMAND, cwd=tmp_path, text="\n".join(commands))
    listing, *shown = printed.split("$ plugins show ")
    rows = [line.split() for line in listing.splitlines()]
    for (name, hook), text in zip(NAMES.items(), shown, strict=True):
        assert [hook, name, f"dovetail-{name}", "0.1.0", "loads"] in rows
        assert text.startswith(f"{name}\n{name}: ")
        assert f"dovetail-{name} 0.1.0 (dovetail_{name})" in text
    assert "factor: number = 1.0\n      What the task's first input is multiplied by." in printed


@pytest.mark.slow
def test_new_plugins_pass_their_own_tests(plugins: Installed) -> None:
    """Their settings of pytest are the same, so that one process may run them all."""
    folders = list(plugins.projects.values())
    settings = ("-c", str(folders[0] / "pyproject.toml"), "--rootdir", str(folders[0].parent))
    quiet = ("-q", "--show-capture=no", "-p", "no:cacheprovider", "-rs")
    tests = [str(folder / "tests") for folder in folders]
    printed = plugins.run("-m", "pytest", *settings, *quiet, *tests, cwd=folders[0].parent)
    assert "passed" in printed


@pytest.mark.slow
def test_new_plugins_take_part_in_a_run_that_names_them(plugins: Installed, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    examples = [config_example(PluginNames(name), hook) for name, hook in NAMES.items()]
    (tmp_path / "toy.toml").write_text("\n".join([*examples, CONFIG]))
    # The example's own backend takes a C++ compiler.
    override = "compile.swift.backend=aot_eager"
    printed = plugins.run("-m", "dovetail", "train", "toy.toml", override, cwd=tmp_path)
    (lock,) = tmp_path.glob("runs/run/*/plugins.lock.json")
    for name, hook in NAMES.items():
        named = {"hook": hook, "name": name, "distribution": f"dovetail-{name}", "version": "0.1.0"}
        (row,) = [row for row in json.loads(lock.read_text())["plugins"] if row["name"] == name]
        assert named.items() <= row.items()
        assert hook == "wrap" or f"dovetail_timed: {hook} made a" in printed
    rows = (lock.parent / "rows" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 1]  # a step of 4 batches, an evaluation
    manifest = json.loads((lock.parent / "bundle" / "manifest.json").read_text())
    assert list(manifest["artifacts"]) == ["graph"]
