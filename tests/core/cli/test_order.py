"""`dovetail plugins order`: what would run for a hook."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Install = Callable[..., Path]
Run = Callable[..., Result]

TRACKER = """
from dovetail import hookimpl

@hookimpl
def dovetail_log(run):
    return None
"""

WRAPPER = """
from dovetail import hookimpl

@hookimpl(wrapper=True)
def dovetail_log():
    return (yield)
"""


@pytest.fixture
def wrapped(install: Install, tmp_path: Path) -> Path:
    """A config of two trackers with three wrappers, one of which wants to come earlier."""
    install("track-tools", {"log": ("one", "two")}, TRACKER)
    install("time-tools", {"wrap": ("timer",)}, WRAPPER)
    install("load-tools", {"wrap": ("upload",)}, f"{WRAPPER}\ndovetail_before = ('timer', 'x')")
    install("other-tools", {"wrap": ("other",)}, WRAPPER.replace("_log", "_export"))
    config = tmp_path / "c.toml"
    config.write_text(
        '[run]\nplugins = ["timer", "other", "upload"]\n[log]\nuse = ["one", "two"]\n'
    )
    return config


def rows_of(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    return [line.split(maxsplit=4) for line in result.stdout.splitlines()]


def test_order_shows_wrappers_then_the_backend_for_each(wrapped: Path, run_cli: Run) -> None:
    rows = rows_of(run_cli("plugins", "order", "log", str(wrapped)))
    header = ["ORDER", "PLUGIN", "DISTRIBUTION", "VERSION", "WHY"]
    around = [
        ["1", "upload", "load-tools", "1.2", "run.plugins[2], before timer"],
        ["2", "timer", "time-tools", "1.2", "run.plugins[0]"],
    ]
    assert rows == [
        header,
        *around,
        ["3", "one", "track-tools", "1.2", "backend"],
        [],
        header,
        *around,
        ["3", "two", "track-tools", "1.2", "backend"],
    ]


def test_order_takes_settings_with_and_without_a_config(wrapped: Path, run_cli: Run) -> None:
    rows = rows_of(run_cli("plugins", "order", "log", str(wrapped), "log.use=two"))
    assert [row[1] for row in rows[1:]] == ["upload", "timer", "two"]
    rows = rows_of(run_cli("plugins", "order", "log", "log.use=one"))
    assert [row[1] for row in rows[1:]] == ["one"]


def test_order_of_the_defaults_is_shown_without_a_config(run_cli: Run) -> None:
    rows = rows_of(run_cli("plugins", "order", "accumulate"))
    assert [row[1:3] for row in rows[1:]] == [["exact", "dovetail"]]


def test_order_says_so_when_nothing_runs(run_cli: Run) -> None:
    result = run_cli("plugins", "order", "log", "log.use=[]")
    assert result.stdout == "Nothing runs for log: log.use names no backend.\n"


def test_order_is_printed_as_json(wrapped: Path, run_cli: Run) -> None:
    result = run_cli("plugins", "order", "--json", "log", str(wrapped), "log.use=one")
    ((*_, last),) = json.loads(result.stdout)
    assert last == {
        "order": 3,
        "plugin": "one",
        "distribution": "track-tools",
        "version": "1.2",
        "why": "backend",
    }
    assert json.loads(run_cli("plugins", "--json", "order", "log", "log.use=[]").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lgo",), "'lgo' is not one of"),
        (("log", "absent.toml"), "config file 'absent.toml': not found"),
        (("log", "log.use=tow"), "no plugin is called 'tow'"),
        (("collate", "task.modality=smell"), "Unsupported modality: smell"),
        (("log", "log.use=one", "--no-autoload"), "option --no-autoload keeps it out"),
    ],
)
def test_order_fails_as_the_run_would(
    wrapped: Path, run_cli: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli("plugins", "order", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
