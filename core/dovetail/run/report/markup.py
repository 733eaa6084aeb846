"""Pieces of HTML, with everything that comes from a run escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Markup:
    """A cell that is HTML already."""

    text: str


def escape(value: Any) -> str:
    """Return a value as text that is safe between tags and in attributes."""
    return html.escape(show(value))


def show(value: Any) -> str:
    """Return a value as a reader wants it: five digits that matter, nothing for `None`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "(empty)"
    return str(value)


def table(caption: str, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in a box that scrolls by itself and that a keyboard reaches.

    Args:
        caption: What it shows.
        header: Titles of the columns.
        rows: Cells; the first of each row names it.
    """
    head = "".join(f"<th scope='col'>{_cell(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{_cell(row[0])}</th>"
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    name = escape(caption)
    return (
        f"<div class='scroll' role='region' aria-label='{name}' tabindex='0'><table>"
        f"<caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        "</table></div>"
    )


def _cell(cell: Any) -> str:
    return cell.text if isinstance(cell, Markup) else escape(cell)


def details(summary: str, text: str) -> str:
    """Return text that unfolds."""
    return (
        f"<details><summary>{escape(summary)}</summary>"
        f"<pre tabindex='0'>{html.escape(text)}</pre></details>"
    )


def section(identity: str, title: str, content: str) -> str:
    """Return a section with its heading; without content, nothing."""
    if not content:
        return ""
    return (
        f"<section aria-labelledby='{identity}'><h2 id='{identity}'>{escape(title)}</h2>"
        f"{content}</section>"
    )
