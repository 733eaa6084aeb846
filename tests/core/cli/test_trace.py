"""`dovetail plugins trace`: the hook calls of a real run that takes no step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Install = Callable[..., Path]
Run = Callable[..., Result]

TRACKER = """
import pathlib
import warnings

from dovetail import hookimpl


class Tracker:
    capabilities = frozenset()

    def __init__(self, run):
        self.run = run
        pathlib.Path("opened.txt").write_text(str(run.directory))

    def log(self, metrics, step):
        raise AssertionError("a step was taken")

    def log_params(self, params):
        pass

    def log_figure(self, name, path, step):
        pass

    def log_artifact(self, name, path):
        pass

    def close(self, status):
        pathlib.Path("closed.txt").write_text(status)


@hookimpl
def dovetail_log(run):
    print("a tracker that talks")
    warnings.warn("the weather is bad")
    return Tracker(run)
"""

WRAPPER = """
import time
from dovetail import hookimpl

@hookimpl(wrapper=True)
def dovetail_log():
    time.sleep(0.05)
    return (yield)
"""


@pytest.fixture
def traced(exporting_project: Any, install: Install) -> Any:
    install("track-tools", {"log": ("talk",)}, TRACKER)
    install("time-tools", {"wrap": ("timer",)}, WRAPPER)
    return exporting_project


SETTINGS = ("log.use=talk", "export.use=npz", 'run.plugins=["timer"]', "model.kwargs.fail_at=1")


@pytest.mark.filterwarnings("default")
def test_trace_shows_every_call_and_trains_nothing(
    traced: Any, run_cli: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_cli("plugins", "trace", "tiny.toml", *SETTINGS)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["HOOK", "ORDER", "PLUGIN", "DISTRIBUTION", "MS", "RESULT"]
    assert [(*row[:4], row[5]) for row in rows[1:6]] == [
        ("collate", "1", "default", "dovetail-default", "function"),
        ("export", "1", "npz", "dovetail-npz", "Exporter"),
        ("accumulate", "1", "exact", "dovetail", "GradientAccumulator"),
        ("log", "1", "timer", "time-tools", "Tracker"),
        ("log", "2", "talk", "track-tools", "Tracker"),
    ]
    assert float(rows[4][4]) >= 50
    assert result.stdout.splitlines()[-1].startswith("4 hook calls, ")
    assert "a tracker that talks" in capfd.readouterr().err  # it does in a process of its own
    assert "warning: the weather is bad" in result.stderr.splitlines()


@pytest.mark.filterwarnings("default")
def test_trace_leaves_no_run_behind_and_closes_the_trackers(traced: Any, run_cli: Run) -> None:
    assert run_cli("plugins", "trace", "tiny.toml", *SETTINGS).exit_code == 0
    assert not (traced.directory / "runs").exists()
    opened = Path((traced.directory / "opened.txt").read_text())
    assert opened.parts[-2:] == ("tiny", "trace")
    assert not opened.parent.parent.exists()
    assert (traced.directory / "closed.txt").is_file()


@pytest.mark.filterwarnings("default")
def test_trace_is_printed_as_json(traced: Any, run_cli: Run) -> None:
    calls = json.loads(run_cli("plugins", "trace", "tiny.toml", *SETTINGS, "--json").stdout)
    assert calls[-1]["ms"] >= 0
    del calls[-1]["ms"]
    assert calls[-1] == {
        "hook": "log",
        "order": 2,
        "plugin": "talk",
        "distribution": "track-tools",
        "version": "1.2",
        "result": "Tracker",
    }


def test_trace_shows_the_calls_before_a_failure(traced: Any, run_cli: Run) -> None:
    result = run_cli("plugins", "trace", "tiny.toml", "task.num_classes=3")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model output")
    assert [line.split()[0] for line in result.stdout.splitlines()[:2]] == ["HOOK", "collate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'CONFIG'"),
        (("absent.toml",), "not found"),
        (("tiny.toml", "log.use=tlak"), "Did you mean 'talk'?"),
        (("tiny.toml", "--no-autoload"), "option --no-autoload keeps it out"),
    ],
)
def test_trace_refuses_what_no_run_could_do(
    traced: Any, run_cli: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli("plugins", "trace", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
