"""Where a run's lines go."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from dovetail.cli import _screen
from dovetail.cli._screen import Screen, choose_mode, draw_standing
from dovetail.cli._watch import Standing


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (60, "step 3/4  ━━━━━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━  loss 0.5"),
        (30, "step 3/4  ━━━━━━╸━━  loss 0.5"),
    ],
)
def test_bar_fills_one_line(columns: int, shown: str) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, no_color=True)
    with console.capture() as captured:
        console.print(draw_standing(Standing("step 3/4", "loss 0.5", 0.75)))
    (line,) = captured.get().splitlines()
    assert line.rstrip().split("  ")[0] == shown.split("  ", maxsplit=1)[0]
    assert line.rstrip().endswith("loss 0.5")
    assert len(line) == columns


@pytest.mark.parametrize(
    ("flags", "rank", "mode"),
    [
        ({"quiet": False, "plain": False}, "", "plain"),
        ({"quiet": False, "plain": False}, "0", "plain"),
        ({"quiet": False, "plain": True}, "0", "plain"),
        ({"quiet": True, "plain": True}, "0", "quiet"),
        ({"quiet": False, "plain": False}, "1", "quiet"),
    ],
)
def test_mode_is_chosen_when_nothing_is_a_terminal(
    flags: dict[str, bool], rank: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert choose_mode(**flags) == mode


@pytest.mark.parametrize(
    ("plain", "terminal", "mode"),
    [(False, "xterm", "live"), (True, "xterm", "plain"), (False, "dumb", "plain")],
)
def test_mode_is_chosen_when_output_is_a_terminal(
    plain: bool, terminal: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, side = pty.openpty()
    monkeypatch.setenv("TERM", terminal)
    with os.fdopen(side, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert choose_mode(quiet=False, plain=plain) == mode
    os.close(main)


@pytest.mark.filterwarnings("default")
def test_screen_prints_nothing_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen("quiet")
    with screen.bar(lambda: Standing("")), screen.warnings_as_lines():
        screen.say("a line")
        warnings.warn("careful", stacklevel=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_screen_shows_a_warning_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with Screen("plain").warnings_as_lines():
        warnings.warn("the disk\n   is [bold]nearly[/] full", stacklevel=1)
    assert capsys.readouterr() == ("warning: the disk is [bold]nearly[/] full\n", "")
    assert warnings.showwarning is before


def test_screen_goes_silent_when_nothing_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    screen = Screen("plain")
    with monkeypatch.context() as patch:
        patch.setattr(_screen, "say", refuse)
        screen.say("lost")
    screen.say("lost too")
    assert capsys.readouterr() == ("", "")


FORKING = """
import os, sys, warnings
from dovetail.cli._screen import Screen
from dovetail.cli._watch import Standing

screen = Screen("live")
original = sys.stdout
with screen.bar(lambda: Standing("working", "well", 0.5)), screen.warnings_as_lines():
    screen.say("above the bar")
    print("printed by the user")
    warnings.warn("careful")
    assert sys.stdout is not original
    child = os.fork()
    if not child:
        os._exit(0 if sys.stdout is original and screen._live is None else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert sys.stdout is original
print("status", status)
"""


def test_bar_leaves_lines_above_it_and_a_forked_worker_alone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FORKING)
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, str(script)], stdout=side, env=environment)
    os.close(side)
    process.wait()
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert "working" in shown
    assert "━" in shown
    for line in ("above the bar", "printed by the user", "warning: careful", "status 0"):
        assert f"{line}\r\n" in shown
