"""What the commands about runs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

dir_option = click.option(
    "--dir",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Folder that holds all runs, where ids are looked up.",
)


def spell_value(value: float | None) -> str:
    """Return a metric's value in four digits that matter; `-` where there is none."""
    return "-" if value is None else f"{value:.4g}"


def plain_value(value: float | None) -> float | str | None:
    """Return a number as strict JSON can hold it."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def resolve_runs(wanted: Sequence[str], root: Path) -> list[Path]:
    """Return the folders of the runs that a user means, each once.

    Raises:
        RunError: One of them is not there, or an id is that of several.
    """
    from dovetail.run.lookup import resolve_run

    found = [resolve_run(name, root) for name in wanted]
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def label_runs(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell runs apart: ids, or name/id."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels
