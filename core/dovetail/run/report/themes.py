"""Colours and fonts of pictures: for the page, whose style sheet decides, and for papers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dovetail.errors import MissingDependencyError, build_message

# After Okabe and Ito, whose colours readers with colour-blindness tell apart; those that are too
# pale for a line on white, or too dark on black, are shifted.
LIGHT = ("#0072b2", "#d55e00", "#00805e", "#a8448f", "#7a6500", "#1f83c4", "#882255", "#555555")
DARK = ("#56b4e9", "#ff8c42", "#2fd6a3", "#e6a4cf", "#f0e442", "#9ecbff", "#ff7b9c", "#bbbbbb")
LIGHT_INK, LIGHT_PAPER, LIGHT_GRID = "#1f2328", "#ffffff", "#d0d7de"
DARK_INK, DARK_PAPER, DARK_GRID = "#e6edf3", "#0d1117", "#30363d"

LINE_STYLES = {"": "-", "train": "-", "val": "--", "validation": "--", "test": ":", "eval": "-."}
"""By split."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    ink: str
    grid: str
    colors: tuple[str, ...]
    """One per run."""
    font_size: float
    size_inches: tuple[float, float]
    has_legend: bool


def page_theme(num_runs: int) -> Theme:
    """Return the theme of pictures in a page.

    Its colours stand for variables of the style sheet: see `svg_colors`. At the width of a phone
    the letters are 14 pixels high.
    """
    colors = tuple(f"#fe{number:04x}" for number in range(num_runs))
    return Theme("#fd0001", "#fd0002", colors, 13.0, (4.4, 2.75), has_legend=False)


def svg_colors(theme: Theme) -> dict[str, str]:
    """Return what each colour of the page's pictures is in the style sheet."""
    runs = {color: f"var(--run-{number})" for number, color in enumerate(theme.colors)}
    return {theme.ink: "var(--ink)", theme.grid: "var(--grid)", **runs}


def paper_theme(num_runs: int) -> Theme:
    """Return the theme of pictures for papers: light, with a legend in each."""
    colors = run_colors(num_runs, LIGHT)
    return Theme("#000000", LIGHT_GRID, colors, 9.0, (3.5, 2.4), has_legend=True)


def run_colors(num_runs: int, base: tuple[str, ...]) -> tuple[str, ...]:
    """Return a colour for each run; beyond the base, as many as it needs from a colour map."""
    if num_runs <= len(base):
        return base[:num_runs]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ramp = colormaps["turbo"]
    return tuple(to_hex(ramp(0.08 + 0.84 * n / (num_runs - 1))) for n in range(num_runs))


@contextmanager
def applied(theme: Theme) -> Iterator[None]:
    """Context in which figures are made and saved in a theme.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as err:
        hint = 'Install it: pip install "dovetail[report]"'
        message = build_message("report", "matplotlib is not installed", action=hint)
        raise MissingDependencyError(message) from err
    style: Any = {
        "figure.facecolor": "none" if not theme.has_legend else "white",
        "axes.facecolor": "none",
        "savefig.facecolor": "auto",
        "axes.edgecolor": theme.grid,
        "grid.color": theme.grid,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        # Text stays text, for readers and for searching; names in the file follow from it alone.
        "svg.fonttype": "none",
        "svg.hashsalt": "dovetail",
        "font.size": theme.font_size,
        # Mathematical text takes ten times as long as plain text.
        "axes.formatter.limits": (-3, 5),
        "axes.formatter.use_mathtext": False,
    }
    with mpl.rc_context(style):
        yield
