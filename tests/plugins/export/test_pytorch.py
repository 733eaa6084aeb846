from __future__ import annotations

import json
import sys
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dovetail.bundle import build_bundle
from dovetail.errors import BundleError, ExportError
from dovetail.types import Recipe
from dovetail_plugins.export.pytorch import PytorchExporter


@pytest.fixture
def exporter():
    return PytorchExporter()


def run_like(exporter, given, artifact):
    x = np.ones((3, 5), np.float32)
    with torch.no_grad():
        expected = given.model(torch.tensor(x))[0].numpy()
    return exporter.load(artifact.path)({"x": x})["logits"], expected


def test_pytorch_rebuilds_a_model_of_an_installed_package(exporter, served_inputs, tmp_path):
    recipe = Recipe("torch.nn:Linear", {"in_features": 5, "out_features": 3})
    given = served_inputs(nn.Linear(5, 3), recipe)
    artifact = exporter.export(given.model, given.inputs, tmp_path)
    assert sorted(p.name for p in artifact.files) == ["model.json", "model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["bias", "weight"]
    found, expected = run_like(exporter, given, artifact)
    np.testing.assert_array_equal(found, expected)


def test_pytorch_keeps_tied_weights_once_and_ties_them_again(language, keep):
    report = keep("language", language)
    assert [a.max_error for a in report.artifacts if a.format == "pytorch"] == [0.0]
    artifacts = report.path / "artifacts"
    keys = load_file(artifacts / "model.safetensors").keys()
    assert "embed.weight" in keys
    assert "head.weight" not in keys
    described = json.loads((artifacts / "model.json").read_text())
    assert described["aliases"] == {"head.weight": "embed.weight"}


def test_pytorch_takes_along_the_modules_the_factory_imports_and_no_others(language, keep):
    source = keep("language", language).path / "artifacts" / "pytorch_source"
    names = sorted(p.name for p in source.iterdir())
    assert names == ["export_user_layers.py", "export_user_models.py"]


def test_pytorch_takes_a_package_along(exporter, served_inputs, tmp_path):
    folder, out = tmp_path / "project", tmp_path / "out"
    (folder / "export_pkg" / "parts").mkdir(parents=True)
    out.mkdir()
    code = "from torch import nn\ndef build():\n    return nn.Linear(5, 3)\n"
    (folder / "export_pkg" / "parts" / "net.py").write_text(code)
    (folder / "export_pkg" / "parts" / "__init__.py").write_text("")
    (folder / "export_pkg" / "__init__.py").write_text("from .parts.net import build\n")
    (folder / "export_pkg" / "data.bin").write_bytes(b"not source")
    given = served_inputs(nn.Linear(5, 3), Recipe("export_pkg:build", {}, folder))
    artifact = exporter.export(given.model, given.inputs, out)
    found, expected = run_like(exporter, given, artifact)
    np.testing.assert_array_equal(found, expected)
    sources = sorted(p.relative_to(out).as_posix() for p in artifact.files if p.suffix == ".py")
    assert sources == [
        "pytorch_source/export_pkg/__init__.py",
        "pytorch_source/export_pkg/parts/__init__.py",
        "pytorch_source/export_pkg/parts/net.py",
    ]


def test_pytorch_load_leaves_this_process_and_the_folder_as_they_were(
    exporter, vision, models, keep
):
    path = keep("vision", vision).path / "artifacts" / "model.json"
    before = list(sys.path), sys.dont_write_bytecode
    exporter.load(path)
    assert (list(sys.path), sys.dont_write_bytecode) == before
    assert sys.modules["export_user_models"] is models
    assert list(path.parent.rglob("__pycache__")) == []


def test_pytorch_knows_how_the_transform_is_made(vision, keep):
    path = keep("vision", vision).path / "artifacts" / "model.json"
    described = json.loads(path.read_text())
    assert described["transform"] == {
        "factory": "export_user_models:Scale",
        "kwargs": {"by": 255.0},
    }


def test_pytorch_asks_for_an_import_path(exporter, served_inputs, tmp_path):
    given = served_inputs(nn.Linear(5, 3))
    with pytest.raises(ExportError, match=r'\[model\] factory = "package\.module:function"'):
        exporter.export(given.model, given.inputs, tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "/data/w.pt"}, r"model\.kwargs\.weights: is an absolute path"),
        ({"a": {"b": ["x", "C:\\w.pt"]}}, r"model\.kwargs\.a\.b\.1: is an absolute path"),
        ({"act": torch.relu}, "cannot be written as JSON"),
        ({"scale": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_pytorch_refuses_arguments_that_mean_nothing_elsewhere(
    kwargs, message, exporter, served_inputs, tmp_path
):
    given = served_inputs(nn.Linear(5, 3), Recipe("torch.nn:Linear", kwargs))
    with pytest.raises(ExportError, match=message):
        exporter.export(given.model, given.inputs, tmp_path)


def test_pytorch_refuses_a_transform_it_cannot_make_again(exporter, served_inputs, tmp_path):
    class Local(nn.Module):
        config = MappingProxyType({})

        def forward(self, x):
            return x

    recipe = Recipe("torch.nn:Linear", {"in_features": 5, "out_features": 3})
    given = served_inputs(nn.Linear(5, 3), recipe, Local())
    with pytest.raises(ExportError, match="expected a class at the top of a module"):
        exporter.export(given.model, given.inputs, tmp_path)
    given = served_inputs(nn.Linear(5, 3), recipe, nn.ReLU())
    with pytest.raises(ExportError, match="transform ReLU: has config None"):
        exporter.export(given.model, given.inputs, tmp_path)


def test_pytorch_refuses_state_that_is_no_tensor(exporter, served_inputs, tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            self.note = state

    given = served_inputs(Noted(5, 3), Recipe("torch.nn:Linear", {}))
    with pytest.raises(ExportError, match="'_extra_state': is a dict"):
        exporter.export(given.model, given.inputs, tmp_path)


def test_pytorch_load_is_strict(exporter, served_inputs, tmp_path):
    recipe = Recipe("torch.nn:Linear", {"in_features": 5, "out_features": 3, "bias": False})
    given = served_inputs(nn.Linear(5, 3), recipe)
    artifact = exporter.export(given.model, given.inputs, tmp_path)
    with pytest.raises(BundleError, match=r"(?s)does not fit the weights.*Unexpected key.*bias"):
        exporter.load(artifact.path)


def test_pytorch_keeps_views_of_one_storage_apart(exporter, served_inputs, tmp_path):
    model = nn.Linear(5, 3)
    storage = torch.arange(18, dtype=torch.float32)
    model.weight = nn.Parameter(storage[:15].view(5, 3).T)  # not contiguous, and shared
    model.bias = nn.Parameter(storage[15:])
    recipe = Recipe("torch.nn:Linear", {"in_features": 5, "out_features": 3})
    given = served_inputs(model, recipe)
    artifact = exporter.export(given.model, given.inputs, tmp_path)
    found, expected = run_like(exporter, given, artifact)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pytorch_of_a_factory_that_builds_another_model_fails_its_proof(
    exporter, vision, project, tmp_path
):
    other = Recipe("export_user_models:build_vision", {"width": 5}, project)
    with pytest.raises(ExportError, match=r"(?s)does not fit the weights.*size mismatch"):
        build_bundle(
            exporters={"pytorch": exporter},
            destination=tmp_path / "b",
            **{**vision, "recipe": other},
        )
    assert not (tmp_path / "b").exists()
