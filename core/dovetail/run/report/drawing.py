"""Draws panels with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from dovetail.run.report.history import RunHistory, Series
from dovetail.run.report.panels import Line, Panel
from dovetail.run.report.themes import LINE_STYLES, Theme
from dovetail.run.report.thinning import Thinned, thin

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Axis: TypeAlias = Literal["step", "time"]

_MAX_MARKS = 60
_FEW = 40
"""So many points are drawn as dots; more are a line."""


def draw_panel(panel: Panel, runs: Sequence[RunHistory], axis: Axis, theme: Theme) -> Figure:
    """Draw one panel as a figure of its own; `themes.applied` is to be entered before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=theme.size_inches)
    # Fixed margins: measuring all texts takes as long as drawing them.
    axes = figure.add_axes((0.17, 0.21, 0.80, 0.70))
    fill_axes(axes, panel, runs, axis, theme)
    return figure


def draw_sheet(
    panels: Sequence[Panel], runs: Sequence[RunHistory], axis: Axis, theme: Theme
) -> Figure:
    """Draw several panels into one figure, two in a row, with their titles."""
    from matplotlib.figure import Figure

    num_rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(2.5 * theme.size_inches[0], 1.15 * theme.size_inches[1] * num_rows))
    all_axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for axes, panel in zip(all_axes, panels, strict=False):
        fill_axes(axes, panel, runs, axis, theme)
        axes.set_title(panel.title, loc="left")
    for unused in list(all_axes)[len(panels) :] if panels else all_axes:
        unused.set_axis_off()
    figure.tight_layout()
    return figure


def fill_axes(
    axes: Axes, panel: Panel, runs: Sequence[RunHistory], axis: Axis, theme: Theme
) -> None:
    """Draw the lines and marks of a panel."""
    from matplotlib.ticker import (
        EngFormatter,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    unit, unit_s = ("", 1.0) if axis == "step" else _time_unit(panel)
    curves = [(line, thinned(line, axis)) for line in panel.lines]
    if panel.can_be_log and _spans_decades([curve for _, curve in curves]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    for line, curve in curves:
        label = line.name if len(runs) == 1 else f"{runs[line.run].label} {line.split}".strip()
        _draw_curve(axes, curve, unit_s, theme.colors[line.run], LINE_STYLES[line.split], label)
    if panel.starts_at_zero:
        axes.set_ylim(bottom=0)
    for number in sorted({line.run for line in panel.lines}):
        _draw_marks(axes, runs[number], panel, axis, unit_s, theme.colors[number])
    if axis == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("optimizer step" if axis == "step" else f"time of training ({unit})")
    axes.grid(visible=True, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if theme.has_legend and len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize="small")


def thinned(line: Line, axis: Axis) -> Thinned:
    """Return what of a line is drawn; a long one is gathered once."""
    import numpy as np

    if axis not in line.drawn:
        series = line.series
        weights = None if series.weights is None else np.array(series.weights)
        values = np.array(series.values) * line.scale
        line.drawn[axis] = thin(series.over(axis), values, weights)
    return line.drawn[axis]


def _draw_curve(
    axes: Axes, curve: Thinned, unit_s: float, color: str, style: str, label: str
) -> None:
    x = curve.x / unit_s
    if curve.num_per_bin > 1:
        # The outline keeps a peak of a single column visible.
        band, outline = (color, 0.25), (color, 0.6)
        axes.fill_between(x, curve.low, curve.high, facecolor=band, edgecolor=outline, lw=0.7)
    marker = "o" if len(x) <= _FEW else ""
    axes.plot(x, curve.mean, color=color, ls=style, lw=1.4, marker=marker, ms=3.5, label=label)
    if len(curve.non_finite_x):
        places = _some(curve.non_finite_x) / unit_s
        bottom = axes.get_xaxis_transform()  # y from 0 to 1, whatever the values are
        axes.plot(places, [0.03] * len(places), "x", color=color, transform=bottom, ms=5)


def _draw_marks(
    axes: Axes, run: RunHistory, panel: Panel, axis: Axis, unit_s: float, color: str
) -> None:
    for series, style in ((run.skips, ":"), (run.resumes, "-.")):
        for x in _places(series, axis):
            axes.axvline(x / unit_s, color=color, lw=0.9, ls=style, alpha=0.8)
    places = _places(run.checkpoints, axis)
    if panel.has_checkpoints and len(places):
        bottom = axes.get_xaxis_transform()
        x = places / unit_s
        axes.plot(x, [0.0] * len(x), "^", color=color, transform=bottom, ms=6, clip_on=False)


def _places(series: Series, axis: Axis) -> NDArray[np.float64]:
    return _some(series.over(axis))


def _some(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return at most so many marks, spread over all of them."""
    import numpy as np

    marks: NDArray[np.float64] = np.unique(places)
    if len(marks) > _MAX_MARKS:
        marks = marks[np.linspace(0, len(marks) - 1, _MAX_MARKS).astype(int)]
    return marks


def _spans_decades(curves: Sequence[Thinned]) -> bool:
    """Return whether a linear scale would flatten the curves."""
    import numpy as np

    values = np.concatenate([part for c in curves for part in (c.low, c.high)])
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 20 * np.median(values))


def _time_unit(panel: Panel) -> tuple[str, float]:
    longest_s = max((line.series.times_s[-1] for line in panel.lines), default=0.0)
    if longest_s < 180:
        return "s", 1.0
    return ("min", 60.0) if longest_s < 3 * 3600 else ("h", 3600.0)
