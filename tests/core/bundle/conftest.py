"""A distribution of small exporters, and a small bundle built with the honest one."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dovetail.bundle import build_bundle
from dovetail.task import TaskSpec

# A runtime of its own: weights in a NumPy file, run with NumPy, in a process without torch.
EXPORTERS = """
import os, sys
import numpy as np
from dovetail import PluginOptions, hookimpl
from dovetail.types import Artifact


class Options(PluginOptions):
    factor: float = 1.0


class Linear:
    requirements = ("numpy>=1.26",)
    carries_code = False

    def __init__(self, name, factor=1.0):
        self.name, self.factor = name, factor

    def export(self, model, inputs, directory):
        path = directory / f"{self.name}.npz"
        weight, bias = model.model.weight, model.model.bias
        np.savez(path, weight=weight.numpy() * np.float32(self.factor), bias=bias.numpy())
        return Artifact(self.name, path, (path,), {"inputs": [s.name for s in inputs.specs]})

    def load(self, path):
        state = np.load(path)

        def run(inputs):
            (x,) = inputs.values()
            return {"logits": (x @ state["weight"].T + state["bias"]).astype(np.float32)}

        return run


class Liar(Linear):
    def export(self, model, inputs, directory):
        self.factor = 1.01
        return super().export(model, inputs, directory)


class Mangling(Linear):
    def load(self, path):
        run = super().load(path)
        return lambda inputs: self.mangle(run(inputs))


class Nan(Mangling):
    def mangle(self, outputs):
        outputs["logits"][0, 0] = np.nan
        return outputs


class Double(Mangling):
    def mangle(self, outputs):
        return {"logits": outputs["logits"].astype(np.float64)}


class Renamed(Mangling):
    def mangle(self, outputs):
        return {"probabilities": outputs["logits"]}


class Transposed(Mangling):
    def mangle(self, outputs):
        return {"logits": outputs["logits"].T}


class Dying(Mangling):
    def mangle(self, outputs):
        print("the library gives up", file=sys.stderr, flush=True)
        os._exit(3)


class Chatty(Mangling):
    def mangle(self, outputs):
        print("loading... {}")
        os.write(1, b"from C\\n")
        return outputs


class FixedBatch(Mangling):
    def load(self, path):
        run = super(Mangling, self).load(path)

        def fixed(inputs):
            (x,) = inputs.values()
            return run({"x": x.reshape(4, -1)})

        return fixed


class Failing(Linear):
    error = RuntimeError("no such operator in /home/somebody/model.py")

    def export(self, model, inputs, directory):
        (directory / "half").write_bytes(b"half")
        raise self.error


class Interrupted(Failing):
    error = KeyboardInterrupt()


class Careless(Linear):
    def export(self, model, inputs, directory):
        (directory / "forgotten.bin").write_bytes(b"?")
        return super().export(model, inputs, directory)


class Trainer(Linear):
    def export(self, model, inputs, directory):
        model.train()
        return super().export(model, inputs, directory)


class Plugin:
    dovetail_api = 1

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    @hookimpl
    def dovetail_export(self, options: Options):
        return self.kind(self.name, options.factor)


KINDS = {kind.__name__.lower(): kind for kind in [
    Linear, Liar, Nan, Double, Renamed, Transposed, Dying, Chatty, FixedBatch, Failing,
    Interrupted, Careless, Trainer,
]}
globals().update({name: Plugin(kind, name) for name, kind in KINDS.items()})
"""


@pytest.fixture(scope="package")
def exporters(tmp_path_factory):
    """Return makers of exporters by name; all of them are installed under their names."""
    site = tmp_path_factory.mktemp("site")
    (site / "bundle_test_exporters.py").write_text(EXPORTERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        module = importlib.import_module("bundle_test_exporters")
        metadata = site / "bundle_test_exporters-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Name: bundle-test-exporters\nVersion: 1.0\n")
        lines = [f"{name} = bundle_test_exporters:{name}" for name in module.KINDS]
        (metadata / "entry_points.txt").write_text("\n".join(["[dovetail.export]", *lines]))
        yield {
            name: (lambda kind=kind, name=name: kind(name)) for name, kind in module.KINDS.items()
        }
        del sys.modules["bundle_test_exporters"]


@pytest.fixture
def task():
    return TaskSpec(name="line", num_classes=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def make_batch(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {"x": torch.randn(size, 5, generator=generator), "labels": torch.zeros(size)}


@pytest.fixture
def batches():
    return {"example": make_batch(4), "golden": [make_batch(n) for n in (1, 2, 3, 8)]}


@pytest.fixture(scope="package")
def built(exporters, tmp_path_factory):
    """Return a bundle with one format; tests that change it take `bundle`."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("built") / "bundle"
    build_bundle(
        nn.Linear(5, 3),
        TaskSpec(name="line", num_classes=3),
        {"linear": exporters["linear"]()},
        path,
        example=make_batch(4),
        golden=[make_batch(1), make_batch(2)],
        training_config={"train": {"lr": 0.1}},
    )
    return path


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    """Return a copy of a bundle, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))
