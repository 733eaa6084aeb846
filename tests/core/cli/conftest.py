"""A tiny project in a folder, commands that run in it, and plugins of strangers."""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dovetail.cli import _state
from dovetail.cli._group import cli

MODULE = '''
import signal

import torch
from torch import nn


class Net(nn.Module):
    """Two classes from six numbers; may raise or be interrupted at a micro-batch."""

    def __init__(self, fail_at=0, interrupt_at=0, warn_at=0):
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.seen = 0
        self.events = {fail_at: self.fail, interrupt_at: self.interrupt, warn_at: self.warn}

    def forward(self, x):
        if self.training:
            self.seen += 1
            if self.seen in self.events:
                self.events[self.seen]()
        return self.linear(x)

    def fail(self):
        raise KeyError("the user's own mistake")

    def interrupt(self):
        signal.raise_signal(signal.SIGINT)

    def warn(self):
        import warnings
        warnings.warn("the weather\\n  is bad")


def build_model(**kwargs):
    return Net(**kwargs)


def load_splits(num_samples=16):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=rng)
    samples = [{"x": x, "labels": int(x.sum() > 0)} for x in inputs]
    return {"train": samples, "validation": samples[:8]}


def load_interrupted():
    raise KeyboardInterrupt
'''

CONFIG = """
[run]
name = "tiny"
[model]
factory = "{module}:build_model"
[data]
factory = "{module}:load_splits"
[task]
name = "tiny"
modality = "tabular"
num_classes = 2
[train]
epochs = 2
batch_size = 4
device = "cpu"
[collate]
use = "default"
"""

COLLATOR = """
'''Stacks what the samples hold.'''
from torch.utils.data import default_collate

from dovetail import hookimpl


@hookimpl
def dovetail_collate(task):
    return default_collate
"""


EXPORTER = """
'''Writes a linear model as NumPy arrays.'''
import os

import numpy as np

from dovetail import hookimpl
from dovetail.types import Artifact


class Exporter:
    requirements = ("numpy>=1.26",)
    carries_code = False

    def export(self, model, inputs, directory):
        path = directory / "model.npz"
        np.savez(path, **{k.rpartition(".")[2]: v for k, v in model.state_dict().items()})
        return Artifact("npz", path, (path,))

    def load(self, path):
        arrays = np.load(path)
        offset = np.float32(os.environ.get("PLANTED_ERROR", "0"))
        weight, bias = arrays["weight"], arrays["bias"]
        return lambda inputs: {"logits": inputs["x"] @ weight.T + bias + offset}


@hookimpl
def dovetail_export(task):
    return Exporter()
"""

BAD_EXPORTER = """
from dovetail import hookimpl
from dovetail.errors import ExportError
from dovetail.types import Artifact


class Exporter:
    requirements = ()
    carries_code = False

    def export(self, model, inputs, directory):
        raise ExportError("the format knows no linear layers")

    def load(self, path):
        raise AssertionError


@hookimpl
def dovetail_export(task):
    return Exporter()
"""


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Run a command in this process, its standard output and error apart."""

    # Before click 8.2 the two came as one stream unless they were asked for apart.
    is_old = "mix_stderr" in inspect.signature(CliRunner).parameters
    runner = CliRunner(mix_stderr=False) if is_old else CliRunner()

    def run(*arguments: str) -> Result:
        return runner.invoke(cli, list(arguments), prog_name="dovetail")

    return run


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install a distribution of one module into a folder on the path.

    `install(distribution, {"collate": ("name",)}, source, requires=("torch",))` returns the
    folder. All entry points lead to the module, which is not imported.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    # The fresh processes in which artifacts are proven find it too.
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setattr("dovetail.registry._default", None)
    _state._is_installed.cache_clear()  # kept for the time of a command
    before = set(sys.modules)
    numbers = itertools.count()

    def make(
        distribution: str,
        plugins: dict[str, tuple[str, ...]],
        source: str = "",
        requires: tuple[str, ...] = (),
    ) -> Path:
        module = f"{tmp_path.name.replace('-', '_')}_plugin_{next(numbers)}"
        (site / f"{module}.py").write_text(source)
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {distribution}", "Version: 1.2"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        groups = [
            f"[dovetail.{'plugins' if hook == 'wrap' else hook}]\n"
            + "\n".join(f"{name} = {module}" for name in names)
            for hook, names in plugins.items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
        monkeypatch.syspath_prepend(site)  # forgets what the import system knew of the folder
        return site

    yield make
    for name in set(sys.modules) - before:
        if name.startswith(tmp_path.name.replace("-", "_")):
            del sys.modules[name]


@pytest.fixture
def light_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the process that imports plugins the import of torch."""
    monkeypatch.setattr("dovetail.registry.probe.PRELOADED", ())


@dataclass(frozen=True)
class Project:
    """A folder with a config and the module it names."""

    directory: Path
    config: str = "tiny.toml"

    @property
    def runs(self) -> list[Path]:
        """The folders of its runs, the oldest first."""
        return sorted((self.directory / "runs" / "tiny").iterdir(), key=lambda p: p.stat().st_mtime)


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., Path]
) -> Iterator[Project]:
    """A project that trains in a moment, its folder the working folder."""
    directory = tmp_path / "project"
    directory.mkdir()
    module = f"{tmp_path.name.replace('-', '_')}_project"
    (directory / f"{module}.py").write_text(MODULE)
    (directory / "tiny.toml").write_text(CONFIG.format(module=module))
    install("dovetail-default", {"collate": ("default",)}, COLLATOR)
    monkeypatch.chdir(directory)
    monkeypatch.delenv("RANK", raising=False)
    path = list(sys.path)
    yield Project(directory)
    sys.path[:] = path
    sys.modules.pop(module, None)
    shutil.rmtree(directory / "runs", ignore_errors=True)


@pytest.fixture
def exporting_project(project: Project, install: Callable[..., Path]) -> Project:
    """A project in which there are two formats: "npz", and "bad", which always fails."""
    install("dovetail-npz", {"export": ("npz",)}, EXPORTER)
    install("dovetail-bad", {"export": ("bad",)}, BAD_EXPORTER)
    return project
