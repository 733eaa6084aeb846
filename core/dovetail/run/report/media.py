"""Figures, texts and histograms that a run logged, embedded into the page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.run.report.history import RunHistory
from dovetail.run.report.markup import details, escape
from dovetail.run.report.svg import to_svg
from dovetail.run.report.themes import applied, page_theme, svg_colors

LIMIT_BYTES = 3_000_000
"""Bytes of files that are embedded, those of all runs together."""
_TEXT_CHARACTERS = 20_000
_MAX_ITEMS = 60
_PNG = b"\x89PNG\r\n\x1a\n"


def media_part(runs: Sequence[RunHistory]) -> str:
    """Return the newest of each thing that the runs logged, as far as there is room."""
    room = _Room()
    parts = []
    for number, run in enumerate(runs):
        newest = {(record["kind"], record.get("name")): record for record in run.media}
        counts = _count(run.media)
        shown = [
            _embed(run, number, index, record, counts, room)
            for index, record in enumerate(newest.values())
        ]
        if shown:
            title = "" if len(runs) == 1 else f"<h3>{escape(run.label)}</h3>"
            parts.append(f"{title}<div class='media'>{''.join(shown)}</div>")
    if room.num_left_out:
        limit = f"{LIMIT_BYTES // 1_000_000} MB and {_MAX_ITEMS} things"
        parts.append(
            f"<p>{room.num_left_out} more are not embedded, as a page holds at most {limit} of "
            "them; they lie in the folders of the runs.</p>"
        )
    return "".join(parts)


class _Room:
    """How much may still be embedded."""

    def __init__(self) -> None:
        self._left_bytes = LIMIT_BYTES
        self._num_left = _MAX_ITEMS
        self.num_left_out = 0

    def read(self, path: Path) -> bytes | None:
        """Return a file's bytes, if there is room for them."""
        size_bytes = path.stat().st_size
        if size_bytes > self._left_bytes or not self._num_left:
            self.num_left_out += 1
            return None
        self._left_bytes -= size_bytes
        self._num_left -= 1
        return path.read_bytes()


def _count(media: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], int]:
    counts: dict[tuple[Any, Any], int] = {}
    for record in media:
        key = record["kind"], record.get("name")
        counts[key] = counts.get(key, 0) + 1
    return counts


def _embed(
    run: RunHistory,
    number: int,
    index: int,
    record: Mapping[str, Any],
    counts: Mapping[tuple[Any, Any], int],
    room: _Room,
) -> str:
    kind, name, file = record["kind"], record.get("name", ""), str(record.get("file", ""))
    num_earlier = counts[kind, record.get("name")] - 1
    caption = f"{name}, step {record.get('step', '?')}"
    caption += f" ({num_earlier} earlier)" if num_earlier else ""
    path = _find_inside(run.run_dir, file)
    if kind == "artifact":
        return f"<p>Artifact {escape(name)}: <code>{escape(file)}</code></p>"
    if path is None:
        return f"<p>{escape(caption)}: <code>{escape(file)}</code> is not in the run's folder.</p>"
    try:
        data = room.read(path)
        if data is None:
            return ""
        if kind == "figure":
            return _figure(data, caption)
        if kind == "text":
            return _text(data, caption)
        return _histogram(json.loads(data), caption, f"h{number}-{index}")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as err:
        return f"<p>{escape(caption)}: cannot be shown ({escape(type(err).__name__)}).</p>"


def _find_inside(run_dir: Path, file: str) -> Path | None:
    """Return a file that lies in the run's folder, and nothing that a log points to elsewhere."""
    home = run_dir.resolve()
    try:
        path = (home / file).resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(home) and path.is_file() else None


def _figure(data: bytes, caption: str) -> str:
    if not data.startswith(_PNG):
        raise ValueError("no PNG")
    encoded = base64.b64encode(data).decode("ascii")
    text = escape(caption)
    return (
        f"<figure><img alt='Figure {text}' src='data:image/png;base64,{encoded}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def _text(data: bytes, caption: str) -> str:
    text = data.decode("utf-8", errors="replace")
    if len(text) > _TEXT_CHARACTERS:
        text = f"{text[:_TEXT_CHARACTERS]}\n… {len(text) - _TEXT_CHARACTERS} characters more"
    return details(caption, text)


def _histogram(data: Mapping[str, Any], caption: str, prefix: str) -> str:
    from matplotlib.figure import Figure

    counts = [float(count) for count in data["counts"]]
    edges = [float(edge) for edge in data["edges"]]
    theme = page_theme(1)
    with applied(theme):
        figure = Figure(figsize=theme.size_inches)
        axes = figure.add_axes((0.17, 0.21, 0.80, 0.70))
        axes.stairs(counts, edges, fill=True, color=theme.colors[0])
        axes.set_ylabel("count")
        axes.spines[["top", "right"]].set_visible(False)
        label = f"Histogram {caption}: {sum(counts):g} values from {edges[0]:g} to {edges[-1]:g}"
        picture = to_svg(figure, prefix, label, svg_colors(theme))
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"
