"""Which panels a report has: one per quantity, with a line per run and split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dovetail.run.report.history import RunHistory, Series
from dovetail.run.report.thinning import Thinned

MAX_PANELS = 40
_SPLITS = ("train", "val", "validation", "test", "eval")
DERIVED = "derived/"
"""Begins the keys of what is computed from the records; no split has this name."""
_THROUGHPUT, _WAIT = f"{DERIVED}throughput", f"{DERIVED}data-wait"
_LR, _NORM = "lr", "grad_norm"
_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    _THROUGHPUT: "Throughput (items/s)",
    _WAIT: "Waiting for data (share of time)",
}
_UNITS = {"_gib": " (GiB)", "_percent": " (%)", "_per_s": " per second"}
_ABBREVIATIONS = ("CPU", "GPU", "MFU", "TFLOPs")
_LATER = (_LR, _NORM, _THROUGHPUT, _WAIT)


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    run: int
    """Number of its run."""
    name: str
    """The metric."""
    split: str
    """"train", "val"… or nothing."""
    series: Series
    scale: float = 1.0
    """Factor on the values."""
    drawn: dict[str, Thinned] = field(default_factory=dict, compare=False, repr=False)
    """What is drawn over each axis, once it is known."""


@dataclass
class Panel:
    """One quantity."""

    key: str
    title: str
    lines: list[Line] = field(default_factory=list)
    has_checkpoints: bool = False
    """Whether the checkpoints are marked in it."""
    can_be_log: bool = False
    """Whether the values may be drawn on a logarithmic scale."""
    starts_at_zero: bool = False


def build_panels(runs: Sequence[RunHistory]) -> tuple[list[Panel], list[str]]:
    """Sort the curves of runs into panels.

    Returns:
        The panels, the loss first, and the names of metrics for which there was no room.
    """
    panels: dict[str, Panel] = {}
    for number, run in enumerate(runs):
        curves = {**run.series, _THROUGHPUT: run.throughput, _WAIT: run.wait}
        for name, series in curves.items():
            if not series.values:
                continue
            split, key = _split_name(name)
            panel = panels.setdefault(key, _new_panel(key))
            panel.lines.append(Line(number, name, split, series))
    ordered = sorted(panels.values(), key=_rank)
    for panel in ordered:
        if panel.key.endswith("_bytes"):
            _scale_bytes(panel)
    left_out = [line.name for panel in ordered[MAX_PANELS:] for line in panel.lines]
    return ordered[:MAX_PANELS], list(dict.fromkeys(left_out))


def _split_name(name: str) -> tuple[str, str]:
    """Return the split of a metric and the panel it belongs to."""
    split, _, rest = name.partition("/")
    return (split, rest) if rest and split in _SPLITS else ("", name)


def _new_panel(key: str) -> Panel:
    return Panel(
        key,
        _TITLES.get(key) or _spell_title(key.removeprefix("system/")),
        has_checkpoints=key == "loss",
        can_be_log=key in ("loss", _NORM),
        starts_at_zero=key in (_THROUGHPUT, _WAIT),
    )


def _spell_title(name: str) -> str:
    """Return "GPU memory peak (GiB)" for gpu_memory_peak_gib."""
    unit = next((suffix for suffix in _UNITS if name.endswith(suffix)), "")
    words = name.removesuffix(unit).replace("_", " ")
    title = words[:1].upper() + words[1:] if words.islower() else words
    for word in _ABBREVIATIONS:
        title = re.sub(rf"\b{word}\b", word, title, flags=re.IGNORECASE)
    return title + _UNITS.get(unit, "")


def _rank(panel: Panel) -> tuple[int, bool, str]:
    if panel.key == "loss":
        return 0, False, ""
    if panel.key in _LATER:
        return 2, False, str(_LATER.index(panel.key))
    if panel.key.startswith("system/"):
        return 3, False, panel.key
    return 1, all(line.split in ("", "train") for line in panel.lines), panel.key


def _scale_bytes(panel: Panel) -> None:
    largest = max((max(line.series.values) for line in panel.lines), default=0.0)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    panel.title = f"{panel.title.removesuffix(' bytes')} ({unit})"
    panel.lines = [
        Line(line.run, line.name, line.split, line.series, 1 / size) for line in panel.lines
    ]
