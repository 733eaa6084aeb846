"""The tables of a report: results, metrics, settings and bundles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.run.report.history import RunHistory
from dovetail.run.report.markup import Markup, details, escape, table
from dovetail.run.settings import find_differences
from dovetail.run.spelling import spell_duration, spell_time

_MAX_ROWS = 200


def results_table(runs: Sequence[RunHistory]) -> str:
    """Return how the runs went, a column for each."""
    columns = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    rows = [[name, *(facts.get(name) for facts in columns)] for name in names]
    return table(
        "Status, steps, best metrics and windows",
        ["", *(swatch(n, run.label) for n, run in enumerate(runs))],
        rows,
    )


def swatch(number: int, label: str) -> Markup:
    """Return a run's name behind its colour."""
    return Markup(
        f"<span class='swatch' style='color: var(--run-{number})' aria-hidden='true'></span>"
        f"{escape(label)}"
    )


def _facts(run: RunHistory) -> dict[str, Any]:
    summary = run.summary
    facts: dict[str, Any] = {
        "run": f"{summary.name}/{summary.id}",
        "status": summary.status,
        "error": summary.error,
        "started (UTC)": spell_time(summary.started_s),
        "duration": spell_duration(summary.duration_s),
        "optimizer steps": f"{summary.num_steps:,}",
        "items": f"{run.num_items:,.0f}" if run.num_items else None,
        "skipped windows": len(run.skips.steps),
        "resumes": summary.num_resumes,
    }
    if summary.best_value is not None:
        mode = "smallest" if summary.monitor_mode == "min" else "largest"
        facts["best step"] = f"{summary.best_step} ({mode} {summary.monitor})"
        facts.update({f"best {k}": v for k, v in summary.best_metrics.items()})
    facts.update({k: v for k, v in run.settings.items() if _is_about_windows(k)})
    return {k: v for k, v in facts.items() if v is not None}


def _is_about_windows(name: str) -> bool:
    return name == "train.batch_size" or name.startswith("accumulate.")


def metrics_tables(runs: Sequence[RunHistory]) -> str:
    """Return the last, smallest and largest value of every metric, a table for each run."""
    parts = []
    for run in runs:
        rows = [[name, *_extremes(run, name)] for name in list(run.series)[:_MAX_ROWS]]
        if not rows:
            continue
        header = ["metric", "last", "smallest", "at step", "largest", "at step", "not finite"]
        parts.append(table(f"Metrics of {run.label}", header, rows))
        if len(run.series) > _MAX_ROWS:
            rest = len(run.series) - _MAX_ROWS
            parts.append(f"<p>{rest} further metrics stand in its metrics.jsonl.</p>")
    return "".join(parts)


def _extremes(run: RunHistory, name: str) -> list[Any]:
    series = run.series[name]
    finite = [i for i, value in enumerate(series.values) if math.isfinite(value)]
    num_bad = len(series.values) - len(finite)
    if not finite:
        return [series.values[-1], None, None, None, None, num_bad]
    low, high = (pick(finite, key=series.values.__getitem__) for pick in (min, max))
    extremes = [x for i in (low, high) for x in (series.values[i], int(series.steps[i]))]
    return [series.values[-1], *extremes, num_bad]


def settings_part(runs: Sequence[RunHistory]) -> str:
    """Return what differs between the settings of the runs, and each run's own, folded."""
    parts = []
    if len(runs) > 1:
        differences = find_differences([run.settings for run in runs])
        differences.pop("run.id", None)
        if differences:
            header = ["setting", *(swatch(n, run.label) for n, run in enumerate(runs))]
            rows = [[name, *values] for name, values in differences.items()]
            parts.append(table("Settings that differ", header, rows))
        else:
            parts.append("<p>The runs have the same settings.</p>")
    for run in runs:
        text = run.config_text
        if text is None and run.settings:
            text = "\n".join(f"{k} = {v!r}" for k, v in run.settings.items())
        if text:
            parts.append(details(f"All settings of {run.label}", text))
    return "".join(parts)


def bundles_part(runs: Sequence[RunHistory]) -> str:
    """Return what the manifests of the runs' bundles say was measured."""
    parts = []
    for run in runs:
        for path in sorted(run.run_dir.glob("bundle*/manifest.json")):
            place = path.parent.name if len(runs) == 1 else f"{run.label}, {path.parent.name}"
            parts.append(_bundle_table(path, place))
    return "".join(parts)


def _bundle_table(path: Path, place: str) -> str:
    try:
        manifest = json.loads(path.read_bytes())
        rows = [_artifact_row(name, entry, manifest) for name, entry in _items(manifest)]
        failures = [f"{f['format']} ({f['stage']}): {f['reason']}" for f in manifest["failures"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"<p>The manifest of {escape(place)} cannot be read.</p>"
    header = ["format", "largest error", "limit", "proven at", "export", "size"]
    told = table(f"Bundle {place}: relative error against the trained model", header, rows)
    failed = "".join(f"<li>{escape(text)}</li>" for text in failures)
    return told + (f"<p>Formats that failed:</p><ul>{failed}</ul>" if failed else "")


def _items(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(manifest["artifacts"].items())


def _artifact_row(name: str, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Any]:
    size_bytes = sum(manifest["files"][file]["size_bytes"] for file in entry["files"])
    sizes = [
        " × ".join(f"{dim} {size}" for dim, size in case["sizes"].items())
        for case in entry["cases"]
    ]
    return [
        name,
        f"{max((case['max_error'] for case in entry['cases']), default=math.nan):.2g}",
        f"{entry['limit']:.2g}",
        ", ".join(sizes),
        f"{entry['export_seconds']:.1f} s",
        f"{size_bytes / 1e6:.2f} MB",
    ]
