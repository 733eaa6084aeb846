from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dovetail.bundle import build_bundle, open_bundle, verify_bundle
from dovetail.bundle.served import served_in_eval
from dovetail.errors import BundleError, ConfigError, ExportError, MissingDependencyError
from dovetail.registry import Registry
from dovetail.task import TaskSpec
from dovetail_plugins.export.onnx import OnnxExporter, Options
from dovetail_plugins.export.pytorch import PytorchExporter


def make_both():
    return {"onnx": OnnxExporter(Options()), "pytorch": PytorchExporter()}


@pytest.fixture(scope="module")
def site_without_torch(tmp_path_factory):
    site = tmp_path_factory.mktemp("no_torch")
    (site / "torch.py").write_text("raise ImportError('torch is not here')")
    return site


@pytest.fixture
def without_torch(site_without_torch, monkeypatch):
    """Hide torch from the processes that a test starts."""
    paths = [str(site_without_torch), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_onnx_plugin_is_found_and_imports_no_heavy_library():
    code = (
        "import sys; from dovetail.registry import Registry; r = Registry();"
        "e = r.export('onnx', None, r.build_options('export', 'onnx', {}));"
        "assert not e.carries_code;"
        "sys.exit(bool({'torch', 'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_onnx_of_a_vision_model_takes_raw_bytes_at_every_batch_size(vision, keep):
    report = keep("vision", vision)
    assert report.is_complete, report.failures
    assert [a.format for a in report.artifacts] == ["onnx", "pytorch"]
    assert all(a.max_error <= 1e-5 for a in report.artifacts)
    assert report.artifacts[0].batch_sizes == (1, 2, 3, 8)
    manifest = open_bundle(report.path).manifest
    assert manifest.inputs[0].dtype == "uint8"
    assert manifest.outputs[0].shape == ("batch", 5)
    # The same numbers as in the float model that was trained: the transform is in the artifact.
    with np.load(report.path / "golden.npz") as golden:
        pixels = torch.tensor(golden["case3/inputs/pixel_values"])
        model = vision["model"].eval()
        with torch.no_grad():
            expected = model(pixels.float() / 255).numpy()
        np.testing.assert_allclose(golden["case3/outputs/logits"], expected, rtol=1e-5, atol=1e-6)


def test_onnx_is_proven_without_torch(vision, keep, without_torch):
    path = keep("vision", vision).path
    report = {f.format: f for f in verify_bundle(path).formats}
    assert report["onnx"].is_ok, report["onnx"].problem
    assert "torch is not here" in report["pytorch"].problem  # so the block does block


def test_readme_runs_the_model_with_onnxruntime_alone(vision, keep, without_torch):
    path = keep("vision", vision).path
    (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=path, check=True, capture_output=True, text=True
    )
    name, *shape, error = ran.stdout.split()
    assert (name, "".join(shape)) == ("logits", "(1,5)")
    assert float(error) < 1e-5


def test_onnx_of_a_language_model_takes_masks_and_every_length(language, keep):
    report = keep("language", language)
    assert report.is_complete, report.failures
    assert report.artifacts[0].max_error <= 1e-5
    cases = open_bundle(report.path).manifest.artifacts["onnx"].cases
    assert [c.sizes["sequence"] for c in cases] == [5, 12, 9, 17]
    graph = onnx.load(report.path / "artifacts" / "model.onnx").graph
    dims = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.input}
    expected = ["batch", "sequence"]
    assert dims == {"input_ids": expected, "attention_mask": expected}
    assert [o.name for o in graph.output] == ["logits"]


def test_onnx_and_manifest_name_no_folder_of_this_machine(language, keep, project):
    path = keep("language", language).path
    for file in path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            for word in (str(project), str(path.parent), os.getcwd(), sys.prefix, "site-packages"):
                assert word.encode() not in data, file


FILES = [
    "README.md",
    "artifacts/model.json",
    "artifacts/model.onnx",
    "artifacts/model.safetensors",
    "artifacts/pytorch_source/export_user_layers.py",
    "artifacts/pytorch_source/export_user_models.py",
    "configs/task_spec.json",
    "configs/training_config.json",
    "golden.npz",
    "manifest.json",
    "requirements.txt",
]


def test_bundle_holds_these_files(language, keep):
    path = keep("language", language).path
    found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert found == FILES


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_one_changed_byte_in_each_file(name, language, keep):
    path = keep("language", language).path / name
    whole = path.read_bytes()
    place = len(whole) // 3
    try:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BundleError, match=re.escape(name)):
            verify_bundle(keep("language", language).path)
    finally:
        path.write_bytes(whole)


def test_onnx_of_a_model_that_fixes_the_batch_fails_and_the_rest_is_kept(rows, tmp_path):
    arguments = rows("looping")
    report = build_bundle(exporters=make_both(), destination=tmp_path / "b", **arguments)
    assert [a.format for a in report.artifacts] == ["pytorch"]
    (failure,) = report.failures
    assert failure.stage == "export"
    assert "fixes a dimension that varies" in failure.reason
    assert "Take sizes from the tensors" in failure.reason


def test_onnx_of_a_model_that_branches_on_values_fails_and_the_rest_is_kept(rows, tmp_path):
    arguments = rows("branching")
    report = build_bundle(exporters=make_both(), destination=tmp_path / "b", **arguments)
    assert [a.format for a in report.artifacts] == ["pytorch"]
    (failure,) = report.failures
    assert failure.stage == "export"
    assert "branches on the values of a tensor (`if x.sum() > 0:" in failure.reason
    assert "torch.where" in failure.reason
    assert verify_bundle(tmp_path / "b").is_ok


# Dynamo's advice on one patch release of Python.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_onnx_of_a_compiled_model_in_training_mode(vision, tmp_path):
    calls = []

    def backend(graph, example):
        return lambda *args: calls.append(1) or graph(*args)

    model = vision["model"].train()
    model.compile(backend=backend)
    report = build_bundle(
        exporters={"onnx": OnnxExporter(Options())}, destination=tmp_path / "b", **vision
    )
    assert report.is_complete
    assert calls == []
    assert all(m.training for m in model.modules())
    model(torch.ones(2, 3, 8, 8))
    assert calls == [1]
    torch._dynamo.reset()


def test_onnx_prints_nothing_whether_it_works_or_not(served_inputs, models, tmp_path, capfd):
    given = served_inputs(nn.Linear(5, 3))
    with served_in_eval(given.model):
        OnnxExporter(Options()).export(given.model, given.inputs, tmp_path)
    given = served_inputs(models.build_branching())
    with pytest.raises(ExportError), served_in_eval(given.model):
        OnnxExporter(Options()).export(given.model, given.inputs, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [18, 21])
def test_onnx_is_written_in_the_opset_that_was_asked_for(opset, served_inputs, tmp_path):
    exporter = OnnxExporter(Options(opset=opset))
    given = served_inputs(nn.Linear(5, 3))
    artifact = exporter.export(given.model, given.inputs, tmp_path)
    assert artifact.metadata == {"opset": opset}
    assert onnx.load(artifact.path).opset_import[0].version == opset
    x = np.ones((7, 5), np.float32)
    with torch.no_grad():
        expected = given.model(torch.tensor(x))[0].numpy()
    np.testing.assert_allclose(exporter.load(artifact.path)({"x": x})["logits"], expected, 1e-5)


@pytest.mark.parametrize("opset", [17, 24])
def test_onnx_options_refuse_an_opset_no_exporter_writes(opset):
    with pytest.raises(ConfigError, match=r"export\.onnx\.opset"):
        Registry().build_options("export", "onnx", {"opset": opset})


def test_onnx_requires_the_runtime_that_knows_the_opset():
    floors = [OnnxExporter(Options(opset=n)).requirements[0] for n in (20, 22, 23)]
    assert floors == ["onnxruntime>=1.20", "onnxruntime>=1.21", "onnxruntime>=1.23"]


def test_onnx_load_turns_telemetry_off_before_the_runtime_starts(vision, keep):
    path = keep("vision", vision).path / "artifacts" / "model.onnx"
    code = (
        "import os, sys; from dovetail_plugins.export.onnx import OnnxExporter, Options;"
        "assert 'ORT_DISABLE_TELEMETRY' not in os.environ;"
        f"OnnxExporter(Options()).load({str(path)!r});"
        "sys.exit(os.environ['ORT_DISABLE_TELEMETRY'] != '1')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ran.returncode == 0


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_names_the_extra_that_is_missing(package, served_inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    given = served_inputs(nn.Linear(5, 3))
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[onnx\]"'):
        OnnxExporter(Options()).export(given.model, given.inputs, tmp_path)


def test_onnx_of_a_transformer_encoder_with_padding(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.layers = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return self.layers(x, src_key_padding_mask=attention_mask == 0).mean(1)

    def draw(size, length):
        mask = torch.ones(size, length, dtype=torch.long)
        mask[-1, -1] = 0
        return {"input_ids": torch.randint(0, 9, (size, length)), "attention_mask": mask}

    report = build_bundle(
        Encoder(),
        TaskSpec(modality="text"),
        {"onnx": OnnxExporter(Options())},
        tmp_path / "b",
        example=draw(4, 7),
        golden=[draw(1, 5), draw(3, 11)],
    )
    assert report.is_complete, report.failures
