"""Pictures of a run: one page without a network, and a PNG."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.errors import MissingDependencyError, build_message
from dovetail.run.tracking import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "report.html"
PICTURE = "report.png"

_THEMES = {
    "light": ("#1f2328", "#ffffff", "#d0d7de"),
    "dark": ("#e6edf3", "#0d1117", "#30363d"),
}
"""Colours of ink, paper and grid."""
# Okabe and Ito's colours, which readers with colour-blindness tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

_STYLE = """
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
       color: #1f2328; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #d0d7de; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } .dark { display: none; } pre { overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } th, td { border-color: #30363d; }
  .dark { display: block; } .light { display: none; } }
"""


@dataclass
class Curve:
    """One metric over the optimizer steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_curves(run_dir: Path) -> tuple[dict[str, Curve], list[int]]:
    """Read a run's curves from its metric log.

    Returns:
        Curves by metric, and the steps after which a window was skipped.
    """
    curves: dict[str, Curve] = {}
    skips: list[int] = []
    for record in read_records(run_dir):
        if record["kind"] == "skip":
            skips.append(record["step"])
        for name, value in record.get("metrics", {}).items():
            if math.isfinite(value):
                curve = curves.setdefault(name, Curve())
                curve.steps.append(record["step"])
                curve.values.append(value)
    return curves, skips


def write_report(run_dir: Path, title: str, results: Mapping[str, Any]) -> Path:
    """Write `report.html` and `report.png` into a run's folder.

    Args:
        run_dir: The run's folder with its metric log.
        title: The run's name.
        results: Rows of the table of results.

    Returns:
        The page. It needs no network and follows the reader's light or dark theme.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    curves, skips = read_curves(run_dir)
    pictures = {}
    for theme in _THEMES:
        with themed(theme):
            figure = draw(curves, skips)
            pictures[theme] = _to_svg(figure)
            if theme == "light":
                figure.savefig(run_dir / PICTURE, dpi=150)
    label = html.escape(f"Curves of {', '.join(curves)}")
    figures = "".join(
        f"<figure class='{theme}' role='img' aria-label='{label}'>{picture}</figure>"
        for theme, picture in pictures.items()
    )
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(str(k))}</th><td>{html.escape(_show(v))}</td></tr>"
        for k, v in results.items()
    )
    config = html.escape((run_dir / "config.toml").read_text(encoding="utf-8"))
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>Run {html.escape(run_dir.name)}</p>{figures}"
        f"<h2>Results</h2><div class='scroll'><table>{rows}</table></div>"
        f"<h2>Config</h2><details><summary>config.toml</summary><pre>{config}</pre></details>"
        "</body></html>\n"
    )
    path = run_dir / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def try_write_report(run_dir: Path, title: str, results: Mapping[str, Any]) -> Path | None:
    """Write the report of a run, as `write_report` does; no failure of it is one of the run.

    Returns:
        The page, or `None` where matplotlib is not installed or the report failed, with a warning.
    """
    try:
        return write_report(run_dir, title, results)
    except MissingDependencyError:
        return None
    except Exception as err:
        found = f"cannot be written: {type(err).__name__}: {err}"
        warnings.warn(build_message(f"report of run {str(run_dir)!r}", found), stacklevel=2)
        return None


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Without a date two reports of one run are the same bytes.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


@contextmanager
def themed(theme: str) -> Iterator[None]:
    """Context in which figures are drawn and saved in a theme, "light" or "dark".

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as err:
        hint = 'Install it: pip install "dovetail[report]"'
        message = build_message("report", "matplotlib is not installed", action=hint)
        raise MissingDependencyError(message) from err
    ink, paper, grid = _THEMES[theme]
    style: Any = {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.edgecolor": grid,
        "grid.color": grid,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        # Text stays text, for readers and for searching; names in the file follow from it alone.
        "svg.fonttype": "none",
        "svg.hashsalt": theme,
        "font.size": 10,
    }
    with mpl.rc_context(style):
        yield


def draw(curves: Mapping[str, Curve], skips: Sequence[int]) -> Figure:
    """Draw a panel per quantity, training and validation in one.

    Args:
        curves: Curves by metric; `train/loss` and `val/loss` share the panel "loss".
        skips: Steps after which a window was skipped, marked in each panel.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in curves:
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    num_rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(9, 2.8 * num_rows))
    axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for panel, names in panels.items():
        _draw_panel(next(axes), panel, {name: curves[name] for name in names}, skips)
    for unused in axes:
        unused.set_axis_off()
    figure.tight_layout()
    return figure


def _draw_panel(axes: Axes, title: str, curves: Mapping[str, Curve], skips: Sequence[int]) -> None:
    for (name, curve), color in zip(curves.items(), _COLORS, strict=False):
        # A few evaluations are points with a line; hundreds of steps are a line.
        marker = "o" if len(curve.steps) <= 30 else ""
        axes.plot(curve.steps, curve.values, color=color, marker=marker, ms=3, lw=1.3, label=name)
    for index, step in enumerate(skips):
        label = "skipped window" if index == 0 else None
        axes.axvline(step, color=_COLORS[3], lw=0.8, ls=":", label=label)
    axes.set_title(title.replace("_", " "), loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.grid(visible=True, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 or skips:
        axes.legend(frameon=False, fontsize=9)


def _show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
