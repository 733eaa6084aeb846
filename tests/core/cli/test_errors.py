"""From an exception to a message and an exit status."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest

from dovetail.cli._errors import run_guarded
from dovetail.errors import (
    ConfigError,
    DovetailError,
    ExportError,
    RunError,
    UnknownPluginError,
    join_problems,
)


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RunError("no"), 1),
        (ExportError("no"), 1),
        (ConfigError("no"), 2),
        (UnknownPluginError("no"), 2),
    ],
)
def test_guard_prints_the_message_alone_when_the_error_is_ours(
    error: DovetailError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(raising(error), []) == status
    assert capsys.readouterr() == ("", "error: no\n")


def test_guard_prints_one_bullet_per_problem(capsys: pytest.CaptureFixture[str]) -> None:
    problems = ["config train.lr: bad.", "config train.epochs: worse."]
    error = ConfigError(join_problems("config 'a.toml'", problems), problems)
    assert run_guarded(raising(error), []) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: config 'a.toml': 2 problems",
        "  - config train.lr: bad.",
        "  - config train.epochs: worse.",
    ]


def test_guard_keeps_the_traceback_when_the_error_is_not_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_guarded(raising(KeyError("x")), []) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "KeyError: 'x'"
    assert lines[-1].startswith("error: unexpected KeyError. ")
    assert "`dovetail version`" in lines[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_guard_returns_130_when_interrupted(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(raising(error), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_guard_takes_an_end_of_file_for_an_error_and_not_for_an_interrupt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_guarded(raising(EOFError("ran out of input")), []) == 1
    assert "EOFError: ran out of input" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "variable"), [(["--debug"], ""), ([], "1")])
def test_guard_shows_the_traceback_of_our_error_when_debugging(
    arguments: list[str],
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DOVETAIL_DEBUG", variable)
    assert run_guarded(raising(RunError("no")), arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: no"


def test_guard_hides_the_traceback_when_debug_is_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOVETAIL_DEBUG", "0")
    assert run_guarded(raising(RunError("no")), []) == 1
    assert capsys.readouterr().err == "error: no\n"


def test_guard_passes_an_exit_status_on() -> None:
    assert run_guarded(raising(click.exceptions.Exit(7)), []) == 7
    assert run_guarded(lambda: None, []) == 0


def test_guard_reports_a_broken_pipe_of_the_users_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(raising(BrokenPipeError("a worker's")), []) == 1
    assert "BrokenPipeError: a worker's" in capsys.readouterr().err
