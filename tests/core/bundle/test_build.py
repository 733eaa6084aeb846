from __future__ import annotations

import getpass
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dovetail.bundle import build_bundle, open_bundle
from dovetail.errors import BundleError, ExportError, ModelError
from dovetail.task import TaskSpec


@pytest.fixture
def build(model, task, batches, exporters, tmp_path):
    def run(*names, **changes):
        arguments = {
            "model": model,
            "task": task,
            "exporters": {name: exporters[name]() for name in names},
            "destination": tmp_path / "bundle",
            **batches,
        }
        return build_bundle(**{**arguments, **changes})

    return run


def test_build_bundle_reports_each_format(build, tmp_path):
    stages = []
    report = build("linear", progress=lambda *stage: stages.append(stage))
    assert report.path == tmp_path / "bundle"
    assert report.is_complete
    (linear,) = report.artifacts
    assert (linear.format, linear.batch_sizes) == ("linear", (1, 2, 3, 8))
    assert linear.max_error <= 1e-5
    assert linear.size_bytes == (report.path / "artifacts" / "linear.npz").stat().st_size
    assert stages == [("linear", "export"), ("linear", "proof"), ("linear", "proven")]


def test_build_bundle_writes_down_what_was_measured(build):
    path = build("linear", training_config={"train": {"lr": 0.1}}).path
    manifest = open_bundle(path).manifest
    assert manifest.inputs[0].shape == ("batch", 5)
    assert manifest.outputs[0].shape == ("batch", 3)
    entry = manifest.artifacts["linear"]
    assert [case.sizes for case in entry.cases] == [{"batch": n} for n in (1, 2, 3, 8)]
    assert entry.metadata == {"format": "linear", "inputs": ["x"]}
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "dovetail", "numpy"} <= set(manifest.versions)
    assert json.loads((path / "configs/training_config.json").read_text())["train"]["lr"] == 0.1
    assert TaskSpec.from_dict(json.loads((path / "configs/task_spec.json").read_text()))
    assert (path / "requirements.txt").read_text() == "numpy>=1.26\n"


def test_build_bundle_makes_exporters_again_with_their_options(build):
    build("linear", options={"linear": {"factor": 2.0}})  # used by export alone: no difference
    with pytest.raises(ExportError, match="fator"):
        build("linear", options={"linear": {"fator": 2.0}}, destination=Path("elsewhere"))


FAULTS = {
    "liar": "at batch 1: differs from the trained model by 0.0",
    "nan": "at batch 1: output 'logits': 1 values are NaN or infinite (and 1 more cases)",
    "double": "output 'logits' is float64 instead of float32",
    "renamed": "outputs are named ['probabilities'] instead of ['logits']",
    "transposed": "output 'logits' has shape (3, 1) instead of (1, 3)",
    "dying": "its runtime ended with status 3 (the library gives up)",
    "fixedbatch": "at batch 1: does not run: ValueError: cannot reshape",
    "failing": "RuntimeError: no such operator in model.py.",
    "careless": "wrote careless.npz, forgotten.bin and names careless.npz",
}


@pytest.fixture(scope="module")
def mixed(exporters, tmp_path_factory):
    """Return the report of a bundle with one honest exporter among all faulty ones."""
    path = tmp_path_factory.mktemp("mixed") / "bundle"
    names = ["trainer", *FAULTS]
    return build_bundle(
        nn.Linear(5, 3),
        TaskSpec(),
        {name: exporters[name]() for name in names},
        path,
        example={"x": torch.ones(4, 5)},
        golden=[{"x": torch.ones(n, 5)} for n in (1, 2)],
    )


@pytest.mark.parametrize("name", FAULTS)
def test_build_bundle_leaves_out_a_format_that_fails_and_says_why(name, mixed):
    (failure,) = [f for f in mixed.failures if f.format == name]
    assert FAULTS[name] in failure.reason
    assert failure.stage == ("export" if name in ("failing", "careless") else "proof")
    assert f"take {name!r} out of export.use" in failure.remedy
    assert name in (mixed.path / "README.md").read_text()
    assert failure.reason in [f.reason for f in open_bundle(mixed.path).manifest.failures]


def test_build_bundle_keeps_the_formats_that_pass_and_only_their_files(mixed):
    assert not mixed.is_complete
    assert [a.format for a in mixed.artifacts] == ["trainer"]
    assert list(open_bundle(mixed.path).manifest.artifacts) == ["trainer"]
    assert [p.name for p in (mixed.path / "artifacts").iterdir()] == ["trainer.npz"]


def test_build_bundle_takes_json_from_a_runtime_that_prints(build):
    assert build("chatty").is_complete


def test_build_bundle_gives_every_exporter_a_model_in_eval_mode(build, exporters):
    kind = type(exporters["linear"]())

    class Unruly(kind):
        def export(self, model, inputs, directory):
            model.train()
            raise ExportError("leaving it in training mode")

    class Asking(kind):
        def export(self, model, inputs, directory):
            modes.append([m.training for m in model.modules()])
            raise ExportError("only asking")

    modes = []
    with pytest.raises(ExportError, match="only asking"):
        build(exporters={"unruly": Unruly("unruly"), "linear": Asking("linear")})
    assert modes == [[False, False, False]]


def test_build_bundle_leaves_nothing_when_every_format_fails(build, tmp_path):
    with pytest.raises(ExportError, match=r"2 problems\n.*failing failed at its export.*\n.*liar"):
        build("failing", "liar")
    assert list(tmp_path.glob("bundle*")) == []


def test_build_bundle_leaves_nothing_and_restores_the_model_when_interrupted(
    build, model, tmp_path
):
    model.train()
    with pytest.raises(KeyboardInterrupt):
        build("linear", "interrupted")
    assert list(tmp_path.glob("bundle*")) == []
    assert model.training


def test_build_bundle_never_overwrites(build, tmp_path):
    place = tmp_path / "bundle"
    place.mkdir()
    (place / "precious").write_text("here")
    with pytest.raises(BundleError, match="is there already; expected a free place"):
        build("linear")
    assert [p.name for p in place.iterdir()] == ["precious"]


def test_build_bundle_never_overwrites_a_dangling_link(build, tmp_path):
    (tmp_path / "bundle").symlink_to(tmp_path / "gone")
    with pytest.raises(BundleError, match="is there already"):
        build("linear")


def test_build_bundle_gives_way_to_one_that_came_meanwhile(build, tmp_path):
    def overtake(name, stage):
        if stage == "proven":
            (tmp_path / "bundle").mkdir()
            (tmp_path / "bundle" / "other").write_text("here")

    with pytest.raises(BundleError, match="is there already"):
        build("linear", progress=overtake)
    assert sorted(p.name for p in tmp_path.glob("bundle*")) == ["bundle"]


def test_build_bundle_refuses_weights_that_are_not_finite(build, tmp_path):
    broken = nn.Linear(5, 3)
    broken.bias.data[1] = float("nan")
    with pytest.raises(ExportError, match=r"model\.bias"):
        build("linear", model=broken)
    assert list(tmp_path.glob("bundle*")) == []


def test_build_bundle_refuses_a_model_that_answers_nan(build):
    class Log(nn.Linear):
        def forward(self, x):
            return torch.log(-x.abs()) + super().forward(x)

    with pytest.raises(ExportError, match="the trained model answers NaN in 'logits'"):
        build("linear", model=Log(5, 5))


def test_build_bundle_names_the_batch_the_model_does_not_take(build):
    class FixedBatch(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(4, 5))

    with pytest.raises(ModelError, match=r"golden batch 0: .* does not take x \(1, 5\)"):
        build("linear", model=FixedBatch(5, 3))


def test_build_bundle_refuses_golden_batches_that_prove_nothing(build, batches):
    with pytest.raises(ExportError, match="'batch' is 4 in all of them"):
        build("linear", golden=[batches["example"]])


def test_build_bundle_needs_a_format(build):
    with pytest.raises(ExportError, match=r"export\.use: names no format"):
        build()


def test_build_bundle_does_not_keep_what_identifies_the_machine(build, tmp_path):
    config = {"dir": str(tmp_path / "runs"), "path": Path.home() / "data.bin", "list": ["~/x"]}
    path = build("linear", "failing", training_config=config).path
    text = b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())
    for word in (str(tmp_path), str(Path.home()), "/home/", os.getcwd()):
        assert word.encode() not in text
    kept = json.loads((path / "configs" / "training_config.json").read_text())
    assert kept == {"dir": "runs", "path": "data.bin", "list": ["x"]}


NASTY = 'a "quoted" `name`/../\n# <script>alert(1)</script> | $(rm -rf ~) \x1b[31m é'


def test_build_bundle_takes_any_characters_in_the_task_s_name(build, tmp_path):
    path = build("linear", task=TaskSpec(name=NASTY)).path
    assert open_bundle(path).manifest.task.name == NASTY
    assert sorted(p.name for p in tmp_path.glob("bundle*")) == ["bundle"]
    title, _, rest = (path / "README.md").read_text(encoding="utf-8").partition("\n")
    assert title.startswith(r"# a " + r'"quoted" \`name\`/../ \# &lt;script\>')
    assert "script" not in rest
    assert "\x1b" not in title


def test_build_bundle_of_a_half_precision_model_has_the_limit_of_its_precision(build, exporters):
    torch.manual_seed(0)
    batches = {
        "example": {"x": torch.randn(4, 5).half()},
        "golden": [{"x": torch.randn(n, 5).half()} for n in (1, 2)],
    }
    with pytest.raises(ExportError, match="float32 instead of float16"):
        build("linear", model=nn.Linear(5, 3).half(), **batches)


def test_bundle_s_user_is_not_named(built):
    user = getpass.getuser()
    assert f"/{user}/" not in (built / "manifest.json").read_text()
