"""The page: one file that loads nothing, executes nothing and needs no mouse."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.run.report.drawing import Axis, draw_panel, thinned
from dovetail.run.report.history import RunHistory
from dovetail.run.report.markup import escape, section, show
from dovetail.run.report.media import media_part
from dovetail.run.report.panels import Panel, build_panels
from dovetail.run.report.results import (
    bundles_part,
    metrics_tables,
    results_table,
    settings_part,
    swatch,
)
from dovetail.run.report.style import style_sheet
from dovetail.run.report.svg import to_svg
from dovetail.run.report.themes import Theme, applied, page_theme, svg_colors

# Nothing can be fetched or executed, whatever stands in the names that a run logged.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SPLIT_STYLES = {"": "", "train": "", "val": "val", "validation": "val", "test": "test"}


def render_page(title: str, runs: Sequence[RunHistory]) -> str:
    """Return the report of some runs as HTML; the same for the same runs.

    Args:
        title: Its heading.
        runs: The runs.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    theme = page_theme(len(runs))
    with applied(theme):
        curves = _curves_part(runs, theme)
        parts = [
            section("results", "Results", results_table(runs)),
            section("curves", "Curves", curves),
            section("metrics", "Metrics", metrics_tables(runs)),
            section("bundle", "Bundle", bundles_part(runs)),
            section("media", "Logged figures and texts", media_part(runs)),
            section("settings", "Settings", settings_part(runs)),
        ]
        style = style_sheet(len(runs))
    name = escape(title)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{name}</title>"
        # Without an icon of its own a browser asks a server for one.
        f"<link rel='icon' href='data:,'><style>{style}</style></head><body>"
        "<a class='skip' href='#main'>Skip to the results</a>"
        f"<header><h1>{name}</h1></header><main id='main' tabindex='-1'>{''.join(parts)}</main>"
        "</body></html>\n"
    )


def _curves_part(runs: Sequence[RunHistory], theme: Theme) -> str:
    panels, left_out = build_panels(runs)
    if not panels:
        return "<p>There are no metrics yet.</p>"
    figures = "".join(
        _panel_figure(number, panel, runs, theme) for number, panel in enumerate(panels)
    )
    rest = f"<p>Not drawn, as there are too many: {len(left_out)} metrics.</p>" if left_out else ""
    return (
        "<div class='curves'><fieldset><legend>Horizontal axis</legend>"
        "<input type='radio' name='axis' id='axis-step' checked>"
        "<label for='axis-step'>optimizer steps</label>"
        "<input type='radio' name='axis' id='axis-time'>"
        "<label for='axis-time'>time</label></fieldset>"
        f"{_legend(runs, panels)}<div class='panels'>{figures}</div></div>{rest}"
    )


def _legend(runs: Sequence[RunHistory], panels: Sequence[Panel]) -> str:
    items = []
    if len(runs) > 1:
        items += [swatch(number, run.label).text for number, run in enumerate(runs)]
    splits = {line.split for panel in panels for line in panel.lines}
    for split in ("train", "val", "validation", "test"):
        if split in splits:
            items.append(f"<span class='stroke {_SPLIT_STYLES[split]}'></span>{split}")
    if any(run.skips.steps for run in runs):
        items.append("┊ dotted upright: a window that was skipped, as it was not finite")
    if any(run.resumes.steps for run in runs):
        items.append("┆ dash-dotted upright: the run was resumed")
    if any(run.checkpoints.steps for run in runs):
        items.append("▲ a checkpoint that is kept")
    if any(len(thinned(x, "step").non_finite_x) for panel in panels for x in panel.lines):
        items.append("× a value that is not finite")
    return f"<ul class='legend'>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _panel_figure(number: int, panel: Panel, runs: Sequence[RunHistory], theme: Theme) -> str:
    label = _describe(panel, runs)
    axes: tuple[tuple[Axis, str], ...] = (("step", "optimizer steps"), ("time", "time"))
    pictures = []
    for axis, words in axes:
        figure = draw_panel(panel, runs, axis, theme)
        text = f"{panel.title} over {words}. {label}"
        picture = to_svg(figure, f"p{number}{axis[0]}", text, svg_colors(theme))
        pictures.append(f"<div class='over-{axis}'>{picture}</div>")
    return (
        f"<figure><figcaption><h3>{escape(panel.title)}</h3></figcaption>"
        f"{''.join(pictures)}{_note(panel)}</figure>"
    )


def _note(panel: Panel) -> str:
    """Say what a point of a long curve stands for."""
    size = max(thinned(line, "step").num_per_bin for line in panel.lines)
    if size == 1:
        return ""
    text = f"Line: mean of up to {size} steps; band: their smallest and largest value."
    return f"<p class='note'>{text}</p>"


def _describe(panel: Panel, runs: Sequence[RunHistory]) -> str:
    """Return what a panel shows in words, for those who cannot see it."""
    parts = []
    for line in panel.lines[:12]:
        values = line.series.values
        first, last = show(values[0] * line.scale), show(values[-1] * line.scale)
        run = "" if len(runs) == 1 else f"{runs[line.run].label}: "
        parts.append(f"{run}{line.name} from {first} to {last}")
    if len(panel.lines) > 12:
        parts.append(f"and {len(panel.lines) - 12} more")
    return "; ".join(parts)
