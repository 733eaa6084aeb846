"""Metrics side by side, with the better one marked where anyone can know it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dovetail.run.comparison import better_mode, compare_metrics, find_better
from dovetail.run.overview import RunSummary


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val/loss", "min"),
        ("train/word_error", "min"),
        ("val/accuracy", "max"),
        ("top5-accuracy", "max"),
        ("train/lr", None),
        ("glossary", None),
    ],
)
def test_better_mode_goes_by_whole_words_of_the_name(name: str, mode: str | None) -> None:
    assert better_mode(name, {}) == mode


def test_better_mode_is_what_the_runs_say() -> None:
    assert better_mode("val/loss", {"val/loss": "max"}) == "max"


def test_better_needs_a_single_best_finite_value() -> None:
    assert find_better([2.0, None, 1.0, math.nan], "min") == 2
    assert find_better([2.0, 1.0], "max") == 0
    assert find_better([1.0, 1.0], "min") is None
    assert find_better([2.0, 1.0], None) is None
    assert find_better([math.nan, math.inf], "max") is None


def test_comparison_marks_nothing_where_runs_do_not_agree() -> None:
    runs = [
        RunSummary(Path(mode), "a", mode, "completed", monitor="val/loss", monitor_mode=mode)
        for mode in ("min", "max")
    ]
    rows = compare_metrics(runs, [{"val/loss": 1.0, "val/f1": 0.5}, {"val/loss": 2.0}])
    assert [(r.name, r.values, r.better) for r in rows] == [
        ("val/loss", (1.0, 2.0), None),
        ("val/f1", (0.5, None), 0),
    ]
