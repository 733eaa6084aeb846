from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dovetail_timing
from dovetail import Artifact, Exporter, ExportInputs, PluginError, RunInfo, TaskSpec, hookimpl
from dovetail.registry import Registry
from dovetail_timing import TimedExporter

BACKENDS = {
    "compile": "same",
    "collate": "tabular",
    "accumulate": "exact",
    "log": "tensorboard",
    "export": "pytorch",
}


@hookimpl
def same(model):
    return model


class Format:
    requirements = ("numpy>=1.26",)
    carries_code = False

    def export(self, model, inputs, directory):
        path = directory / "model.txt"
        path.write_text("weights")
        return Artifact("text", path, (path,))

    def load(self, path):
        return dict

    def runtime_source(self):
        return "load = dict"


class Broken(Format):
    runtime_source = None

    def export(self, model, inputs, directory):
        raise ValueError("no")


def timed(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "dovetail_timing"]


@pytest.fixture
def registry():
    """A registry in which `timing` wraps every hook."""
    return Registry(["timing"])


@pytest.fixture
def export(registry):
    def build(exporter):
        @hookimpl
        def dovetail_export():
            return exporter

        plugin = SimpleNamespace(dovetail_export=dovetail_export)
        registry.register(plugin, hook="export", name="text")
        return registry.export("text", TaskSpec(), registry.build_options("export", "text", {}))

    return build


@pytest.mark.parametrize("hook", BACKENDS)
def test_every_hook_is_timed_by_name(hook, registry, caplog, tmp_path):
    model = nn.Linear(2, 2)
    name = BACKENDS[hook]
    given = {
        "compile": (model, TaskSpec()),
        "collate": (TaskSpec(),),
        "accumulate": (model, torch.optim.SGD(model.parameters(), 0.1), None),
        "log": (RunInfo("a", "b", tmp_path, {}),),
        "export": (TaskSpec(),),
    }[hook]
    if hook == "log":
        pytest.importorskip("tensorboard")
    registry.register(SimpleNamespace(dovetail_compile=same), hook="compile", name="same")
    part = getattr(registry, hook)(name, *given, registry.build_options(hook, name, {}))
    (line,) = timed(caplog)
    assert re.fullmatch(rf"dovetail_{hook}: \d+\.\d{{3}} s, \w+", line)
    if hook == "log":
        part.close("completed")
    if hook != "export":
        assert line.endswith(type(part).__name__)
        assert type(part).__module__.split(".")[0] != "dovetail_timing"


def test_hook_that_raises_is_timed_and_raises(registry, caplog):
    @hookimpl
    def dovetail_collate():
        raise ZeroDivisionError("mine")

    plugin = SimpleNamespace(dovetail_collate=dovetail_collate)
    registry.register(plugin, hook="collate", name="bad")
    options = registry.build_options("collate", "bad", {})
    with pytest.raises(PluginError, match="mine") as raised:
        registry.collate("bad", TaskSpec(), options)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert timed(caplog)[0].endswith("raised ZeroDivisionError")


def test_export_is_timed_and_gives_what_it_gave(export, caplog, tmp_path):
    exporter = export(Format())
    assert isinstance(exporter, Exporter)
    caplog.clear()
    artifact = exporter.export(nn.Linear(2, 2), ExportInputs({}, (), ()), tmp_path)
    assert artifact == Artifact("text", tmp_path / "model.txt", (tmp_path / "model.txt",))
    (line,) = timed(caplog)
    assert re.fullmatch(r"Format\.export: \d+\.\d{3} s, 7 bytes", line)


def test_export_that_raises_is_timed_and_raises(export, caplog, tmp_path):
    with pytest.raises(ValueError, match="no"):
        export(Broken()).export(nn.Linear(2, 2), ExportInputs({}, (), ()), tmp_path)
    assert timed(caplog)[-1].endswith("s, raised ValueError")


def test_exporter_stays_what_it_was(export):
    exporter = export(Format())
    assert exporter.requirements == ("numpy>=1.26",)
    assert exporter.carries_code is False
    assert exporter.runtime_source() == "load = dict"
    assert exporter.load(Path()) is dict
    with pytest.raises(AttributeError, match="other"):
        exporter.other  # noqa: B018 - looking it up is the test
    for again in (copy.copy(exporter), copy.deepcopy(exporter)):
        assert again.runtime_source() == "load = dict"
    assert pickle.loads(pickle.dumps(exporter)).requirements == ("numpy>=1.26",)
    assert isinstance(exporter, TimedExporter)


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("", r"timing: work: 0\.\d{3} s, Thing\n"),
        ("logging.basicConfig(format='%(name)s %(message)s')", r"dovetail_timing work: .*\n"),
        ("logging.getLogger('dovetail_timing').setLevel('ERROR')", ""),
        ("logging.basicConfig(); logging.getLogger('dovetail_timing').setLevel('ERROR')", ""),
    ],
)
def test_lines_go_where_the_program_logs_and_else_to_stderr(setup, expected):
    code = (
        f"import logging\n{setup}\n"
        "from dovetail_timing._stopwatch import measure\n"
        "with measure('work') as timing: timing.result = 'Thing'"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    assert re.fullmatch(expected, ran.stderr)


def test_plugin_that_is_not_named_times_nothing(caplog):
    registry = Registry()
    registry.collate("tabular", TaskSpec(), registry.build_options("collate", "tabular", {}))
    assert timed(caplog) == []
    assert dovetail_timing.dovetail_api == 1
