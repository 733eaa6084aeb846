"""What a run has left behind, as lines."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.cli._console import format_columns
from dovetail.run.spelling import spell_duration

if TYPE_CHECKING:
    from dovetail.bundle.report import BundleReport
    from dovetail.pipeline import TrainingResult

_WIDTH = 80


def describe_result(result: TrainingResult) -> Iterator[str]:
    """Yield the tables of a run: its metrics, and what was exported."""
    yield ""
    yield f"{result.status}: {result.num_steps} steps in {spell_duration(result.duration_s)}"
    names = [n for n in result.final_metrics if n != "train/items"]
    if names:
        rows = [
            (n, _spell(result.final_metrics[n]), _spell(result.best_metrics.get(n))) for n in names
        ]
        yield ""
        yield from format_columns(rows, ("METRIC", "LAST", "BEST CHECKPOINT"))
    if result.bundle is not None:
        yield ""
        yield from describe_bundle(result.bundle)


def describe_bundle(bundle: BundleReport) -> Iterator[str]:
    """Yield a row for each format, and the reason and remedy of each that failed."""
    rows = [
        (
            artifact.format,
            spell_bytes(artifact.size_bytes),
            f"{artifact.max_error:.1e}",
            ", ".join(map(str, artifact.batch_sizes)),
            f"{artifact.seconds:.1f}",
        )
        for artifact in bundle.artifacts
    ]
    rows += [(f.format, "-", "failed", "-", "-") for f in bundle.failures]
    header = ("FORMAT", "SIZE", "MAX ERROR", "PROVEN AT BATCH SIZES", "SECONDS")
    yield from format_columns(rows, header)
    for failure in bundle.failures:
        yield ""
        yield from textwrap.wrap(
            str(failure), _WIDTH, subsequent_indent="  ", break_long_words=False
        )


def describe_paths(result: TrainingResult) -> Iterator[str]:
    """Yield where everything is."""
    rows: list[tuple[str, Path]] = [("run", result.run_dir)]
    if result.best_checkpoint is not None:
        rows.append(("best", result.best_checkpoint))
    if result.report is not None:
        rows.append(("report", result.report))
    if result.bundle is not None:
        rows.append(("bundle", result.bundle.path))
    yield from format_columns([(name, str(path)) for name, path in rows])
    if result.parked_trackers:
        command = shlex.join(["dovetail", "log", "sync", str(result.run_dir)])
        yield f"trackers that lack records: {', '.join(result.parked_trackers)}"
        yield f"hand them over with: {command}"


def spell_bytes(size: float) -> str:
    """Return a size as people read it: 812 B, 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _spell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-" if value is None else "nan"
    return f"{value:.4g}"
