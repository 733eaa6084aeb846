"""Lines and columns: on terminals, in pipes, and in pipes nobody reads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from dovetail.cli._console import format_columns, wrap_text

COMMAND = (sys.executable, "-m", "dovetail")


def read_terminal(*arguments: str, columns: int = 80, **environment: str) -> str:
    """Run a command on a terminal of its own and return all that it showed there."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=side,
        stdout=side,
        stderr=side,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment},
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # Linux says so when the other side has closed
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(main)
    return shown.decode()


def test_columns_stand_under_each_other() -> None:
    rows = [("a", "1", "x"), ("long name", "22", "")]
    assert format_columns(rows, ("NAME", "N", "LAST"), indent=2) == [
        "  NAME       N   LAST",
        "  a          1   x",
        "  long name  22",
    ]


def test_columns_need_no_header() -> None:
    assert format_columns([("a", "b")]) == ["a  b"]


@pytest.mark.parametrize("arguments", [("plugins",), ("version",), ("--help",)])
def test_command_survives_a_reader_that_leaves(arguments: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")


def test_error_is_coloured_on_a_terminal() -> None:
    assert "\x1b[31m\x1b[1merror:\x1b[0m There is no command" in read_terminal("trian")


def test_error_is_plain_when_no_color_is_set() -> None:
    shown = read_terminal("trian", NO_COLOR="1")
    assert "error: There is no command" in shown
    assert "\x1b" not in shown


def test_error_is_wrapped_to_the_terminal() -> None:
    shown = read_terminal("plugins", "show", "nothing-like-it", columns=50, NO_COLOR="1")
    lines = shown.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 50


def test_error_is_one_line_in_a_pipe() -> None:
    ended = subprocess.run(
        [*COMMAND, "plugins", "show", "nothing-like-it"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "\x1b" not in ended.stderr


def test_list_has_no_colour_on_a_terminal_either() -> None:
    assert "\x1b" not in read_terminal("plugins")


def test_wrap_text_keeps_a_command_that_installs_in_one_piece() -> None:
    text = "it is not here. Install it: pip install --upgrade some-tools or leave it out"
    assert wrap_text(text, 34) == [
        "it is not here. Install it:",
        "  pip install --upgrade some-tools",
        "  or leave it out",
    ]
    assert wrap_text("", 20) == [""]
