from __future__ import annotations

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from dovetail import BundleError, ExportError
from dovetail.bundle import build_bundle, verify_bundle
from dovetail.registry import Registry
from dovetail.task import TaskSpec
from dovetail_openvino import OpenvinoExporter, Options, dovetail_api

ROWS = {"x": ("batch", 5)}


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Looping(nn.Linear):
    def forward(self, x):
        return torch.stack([super(Looping, self).forward(x[i]) for i in range(int(x.shape[0]))])


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.LSTM(8, 8, batch_first=True, bidirectional=True)

    def forward(self, tokens):
        return self.layers(self.embed(tokens))[0].mean(1)


class Mixed(nn.Module):
    """Outputs of every type; two are inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x, mask):
        logits = self.layer(x)
        return logits, logits.argmax(-1), logits > 0, logits.double(), logits.half(), x, mask


def rows(size=4):
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(size))


def tokens(size, length):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 20, (size, length), generator=generator)


@pytest.mark.parametrize("is_traced", [False, True])
def test_outputs_keep_names_types_and_order(is_traced, serve, tmp_path):
    names = ("logits", "label", "mask", "wide", "half", "x", "copy")
    tensors = {"x": rows(), "mask": torch.tensor([True, False, True, True])}
    model, inputs = serve(Mixed(), tensors, {**ROWS, "mask": ("batch",)}, names)
    exporter = OpenvinoExporter(is_traced=is_traced)
    run = exporter.load(exporter.export(model, inputs, tmp_path).path)
    for size in (1, 2, 3, 8):
        given = (rows(size), torch.arange(size) % 2 == 0)
        found = run({"x": given[0].numpy(), "mask": given[1].numpy()})
        assert list(found) == list(names)
        for array, tensor in zip(found.values(), model(*given), strict=True):
            wanted = tensor.numpy()
            assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
            assert np.allclose(
                array, wanted, rtol=1e-5, atol=1e-3 if wanted.itemsize == 2 else 1e-6
            )


def test_graph_has_the_names_and_shapes_of_the_signature(serve, tmp_path):
    import openvino

    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    artifact = OpenvinoExporter().export(model, inputs, tmp_path)
    graph = openvino.Core().read_model(str(artifact.path))
    assert [(p.get_names(), str(p.partial_shape)) for p in graph.inputs] == [({"x"}, "[?,5]")]
    assert [p.get_names() for p in graph.outputs] == [{"logits"}]
    assert (artifact.format, artifact.metadata["frontend"]) == ("openvino", "export")


def test_weights_are_stored_whole(serve, tmp_path):
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    artifact = OpenvinoExporter().export(model, inputs, tmp_path)
    assert model.model.weight.numpy().tobytes() in artifact.files[1].read_bytes()


def test_artifact_names_no_folder_of_this_machine(serve, tmp_path):
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    for file in OpenvinoExporter().export(model, inputs, tmp_path).files:
        for word in (str(tmp_path), sys.prefix, __file__):
            assert word.encode() not in file.read_bytes()


def test_precision_is_float32_whatever_the_processor_prefers(serve, tmp_path, monkeypatch):
    import openvino

    seen = []
    compile_model = openvino.Core.compile_model

    def record(self, *arguments):
        seen.append(compile_model(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", record)
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    exporter = OpenvinoExporter()
    path = exporter.export(model, inputs, tmp_path).path
    exporter.load(path)
    namespace = {}
    exec(exporter.runtime_source(), namespace)
    namespace["load"](str(path))
    hints = [compiled.get_property("INFERENCE_PRECISION_HINT") for compiled in seen]
    assert hints == [openvino.Type.f32] * 2


def test_recurrent_layer_takes_every_length_when_traced(serve, tmp_path):
    model, inputs = serve(Recurrent(), {"tokens": tokens(4, 9)}, {"tokens": ("batch", "sequence")})
    exporter = OpenvinoExporter(is_traced=True)
    run = exporter.load(exporter.export(model, inputs, tmp_path).path)
    for size, length in [(1, 5), (2, 12), (3, 9), (8, 17)]:
        given = tokens(size, length)
        wanted = model(given)[0].numpy()
        assert np.abs(run({"tokens": given.numpy()})["logits"] - wanted).max() < 1e-6


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Branching(5, 3), r"branches on the values of a tensor.*torch\.where"),
        (Looping(5, 3), r"fixes a dimension that varies.*x\.shape\[0\].*openvino\.trace = true"),
        (Bessel(), r"no rule for aten\.special_bessel_j0"),
    ],
)
def test_export_says_why_it_fails_and_prints_nothing(layer, message, serve, tmp_path, capfd):
    model, inputs = serve(layer, {"x": rows()}, ROWS)
    root = logging.getLogger()
    before = (root.level, list(root.handlers), list(root.filters))
    with pytest.raises(ExportError, match=message) as raised:
        OpenvinoExporter().export(model, inputs, tmp_path)
    assert raised.value.__cause__ is not None
    assert (root.level, root.handlers, root.filters) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("is_traced", [False, True])
def test_export_that_works_prints_nothing(is_traced, serve, tmp_path, capfd):
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    exporter = OpenvinoExporter(is_traced=is_traced)
    exporter.load(exporter.export(model, inputs, tmp_path).path)
    assert capfd.readouterr() == ("", "")


def test_runner_refuses_inputs_of_other_names(serve, tmp_path):
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    exporter = OpenvinoExporter()
    run = exporter.load(exporter.export(model, inputs, tmp_path).path)
    for given in ({}, {"y": rows().numpy()}, {"x": rows().numpy(), "y": rows().numpy()}):
        with pytest.raises(ValueError, match=r"expected \['x'\]"):
            run(given)


def test_runner_answers_several_threads_at_once(serve, tmp_path):
    model, inputs = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    exporter = OpenvinoExporter()
    run = exporter.load(exporter.export(model, inputs, tmp_path).path)
    wrong = []

    def ask(size):
        given = rows(size)
        for _ in range(50):
            try:
                found = run({"x": given.numpy()})["logits"]
                if not np.allclose(found, model(given)[0].numpy(), atol=1e-6):
                    wrong.append("numbers")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(size,)) for size in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_load_refuses_what_is_no_model_of_this_exporter(serve, tmp_path):
    import openvino

    exporter = OpenvinoExporter()
    (tmp_path / "model.xml").write_text("<net></net>")
    with pytest.raises(BundleError, match="OpenVINO does not load it"):
        exporter.load(tmp_path / "model.xml")
    model, _ = serve(nn.Linear(5, 3), {"x": rows()}, ROWS)
    graph = openvino.convert_model(torch.export.export(model, (rows(),)))
    openvino.save_model(graph, str(tmp_path / "other.xml"))
    with pytest.raises(BundleError, match="as this exporter wrote them"):
        exporter.load(tmp_path / "other.xml")


@pytest.mark.parametrize("how", ["plugin", "runtime_source"])
def test_openvino_reports_to_nobody(how, tmp_path):
    source = (
        OpenvinoExporter().runtime_source()
        if how == "runtime_source"
        else ("from dovetail_openvino._exporter import import_openvino; import_openvino()")
    )
    code = f"{source}\nimport sys\nsys.exit(sys.modules.get('openvino_telemetry') is not None)"
    environment = {"HOME": str(tmp_path), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ran.returncode == 0
    assert not list(tmp_path.iterdir())


def test_openvino_imported_by_the_user_stays_as_it_is():
    code = (
        "import openvino_telemetry as before, sys\n"
        "from dovetail_openvino._exporter import import_openvino\n"
        "import_openvino()\n"
        "sys.exit(sys.modules['openvino_telemetry'] is not before)"
    )
    environment = {"CI": "true"}  # in which that package sends nothing by itself
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_plugin_is_found_and_imports_nothing_heavy():
    code = (
        "import sys; from dovetail.registry import Registry; r = Registry();"
        "r.export('openvino', None, r.build_options('export', 'openvino', {}));"
        "sys.exit(bool({'torch', 'openvino'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_have_help_for_every_field():
    assert all(field.description for field in Options.model_fields.values())
    assert dovetail_api == 1


def test_bundle_is_built_and_verified(tmp_path):
    registry = Registry()
    task = TaskSpec(name="rows", num_classes=3)
    exporter = registry.export("openvino", task, registry.build_options("export", "openvino", {}))
    report = build_bundle(
        nn.Linear(5, 3),
        task,
        {"openvino": exporter},
        tmp_path / "bundle",
        example={"input": rows(4)},
        golden=[{"input": rows(size)} for size in (1, 2, 3, 8)],
    )
    assert report.is_complete, report.failures
    assert report.artifacts[0].max_error < 1e-6
    assert report.artifacts[0].batch_sizes == (1, 2, 3, 8)
    assert verify_bundle(tmp_path / "bundle").is_ok
