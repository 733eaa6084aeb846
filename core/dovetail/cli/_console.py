"""Prints lines and columns, for terminals and for pipes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

_COMMAND = re.compile(r"pip (?:un)?install (?:--\S+ )*\S+")
_GLUE = "\0"  # no blank to textwrap, and in no text


def say(text: str = "") -> None:
    """Print a line on standard output; a reader that has gone away is no error."""
    try:
        click.echo(text, color=_color())
    except BrokenPipeError:
        # The rest goes nowhere, so that the work and its exit status stay what they are.
        discard_output()


def discard_output() -> None:
    """Send whatever still goes to standard output nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())


def complain(text: str) -> None:
    """Print a line on standard error; the exit status tells where nobody reads it."""
    with suppress(OSError):
        click.echo(text, err=True, color=_color())


def _color() -> bool | None:
    """Return `False` where colours are unwanted, or `None` to go by the stream.

    Source: https://no-color.org
    """
    return False if os.environ.get("NO_COLOR") else None


def wrap_text(text: str, width: int, indent: str = "  ") -> list[str]:
    """Break a text into lines; a command that installs something stays in one piece.

    Args:
        text: What is broken at blanks.
        width: Characters of a line.
        indent: Begins every line but the first.
    """
    import textwrap

    glued = _COMMAND.sub(lambda match: match[0].replace(" ", _GLUE), text)
    lines = textwrap.wrap(
        glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_GLUE, " ") for line in lines] or [""]


def format_columns(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: int = 0
) -> list[str]:
    """Align cells under each other.

    Args:
        rows: Cells, the same number in each row.
        header: Titles of the columns.
        indent: Blanks before each line.

    Returns:
        One line per row, two blanks between columns, nothing behind the last cell.
    """
    table = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        (" " * indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip()
        for row in table
    ]
