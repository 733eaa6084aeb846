"""`dovetail runs compare`: results and settings of runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import json_option
from dovetail.cli._runs import dir_option, label_runs, plain_value, resolve_runs, spell_value
from dovetail.run.spelling import spell_duration

if TYPE_CHECKING:
    from dovetail.run.overview import RunSummary

_WIDTH = 80
_VALUE_WIDTH = 40


@click.command()
@click.argument("wanted", metavar="RUN RUN...", nargs=-1, required=True)
@dir_option
@json_option
@debug_option
def compare(wanted: Sequence[str], root: Path, as_json: bool) -> None:
    """Put results and settings of runs side by side.

    A * marks the better value: as the runs' monitor_mode says of the metric they monitor, for
    others as their name tells (loss, error, accuracy, f1 and the like), else nothing is marked.
    Of the settings, those that differ are shown.

    RUN is a run's folder, its id, or "latest".
    """
    from dovetail.run.overview import summarize_run
    from dovetail.run.settings import find_differences, read_settings

    paths = resolve_runs(wanted, root)
    if len(paths) < 2:
        raise click.UsageError("got one run; expected two or more.", click.get_current_context())
    found = [summarize_run(path) for path in paths]
    differences = find_differences([read_settings(path) for path in paths])
    differences.pop("run.id", None)
    labels = label_runs(paths)
    if as_json:
        say(json.dumps(_as_plain(labels, found, differences), indent=2, default=str))
        return
    for line in _describe(labels, found, differences):
        say(line)


def _as_plain(
    labels: Sequence[str], found: Sequence[RunSummary], differences: Mapping[str, Any]
) -> dict[str, Any]:
    from dovetail.cli.runs import as_plain

    return {
        "runs": [
            {"label": label, **as_plain(run)} for label, run in zip(labels, found, strict=True)
        ],
        "metrics": {
            title: {
                row.name: {"values": [plain_value(v) for v in row.values], "better": row.better}
                for row in rows
            }
            for title, rows in _metric_rows(found)
        },
        "settings": differences,
    }


def _metric_rows(found: Sequence[RunSummary]) -> Iterator[tuple[str, Any]]:
    from dovetail.run.comparison import compare_metrics

    yield "best", compare_metrics(found, [run.best_metrics for run in found])
    yield "last", compare_metrics(found, [run.last_metrics for run in found])


def _describe(
    labels: Sequence[str], found: Sequence[RunSummary], differences: Mapping[str, Sequence[Any]]
) -> list[str]:
    rows: list[list[str]] = [
        ["status", *(run.status for run in found)],
        ["steps", *(str(run.num_steps) for run in found)],
        ["took", *(spell_duration(run.duration_s) or "-" for run in found)],
        ["best step", *("-" if r.best_step is None else str(r.best_step) for r in found)],
    ]
    for title, metrics in _metric_rows(found):
        for row in metrics:
            cells = [
                spell_value(value) + (" *" if number == row.better else "")
                for number, value in enumerate(row.values)
            ]
            rows.append([f"{title} {row.name}", *cells])
    lines = _columns(labels, rows)
    if not differences:
        return [*lines, "", "The settings are the same."]
    told = [[name, *map(_spell_setting, values)] for name, values in differences.items()]
    return [*lines, "", "Settings that differ:", *_columns(labels, told)]


def _spell_setting(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 1]}…"


def _columns(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align a table with a column for each run; what is too wide gets a line for each value."""
    lines = format_columns(rows, ["", *labels])
    if max(map(len, lines)) <= _WIDTH:
        return lines
    lines = []
    for name, *values in rows:
        lines.append(name)
        lines += format_columns(list(zip(labels, values, strict=True)), indent=2)
    return lines
