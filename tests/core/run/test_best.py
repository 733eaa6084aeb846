"""Which evaluation is the best, and what becomes of it without a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest

from dovetail.run.best import Best
from dovetail.run.checkpoint import Progress, checkpoint_path


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0], [True, True, False, False, True]),
        ("max", [3.0, 2.0, 3.0, 3.5], [True, False, False, True]),
        ("min", [None, math.nan, 3.0, math.nan], [False, False, True, False]),
    ],
)
def test_best_is_what_is_better_than_all_before(
    mode: Literal["min", "max"], values: list[float | None], expected: list[bool]
) -> None:
    best = Best(mode, Progress())
    assert [best.offer(v, n, {"v": n}) for n, v in enumerate(values)] == expected
    last = max(n for n, is_best in enumerate(expected) if is_best)
    assert (best.value, best.step, best.metrics) == (values[last], last, {"v": last})


def test_best_goes_on_from_what_it_was() -> None:
    best = Best("min", Progress(best_value=1.0, best_step=4, best_metrics={"a": 1.0}))
    assert not best.offer(2.0, 8, {"a": 2.0})
    assert (best.step, best.metrics) == (4, {"a": 1.0})


def test_best_without_a_checkpoint_is_taken_back(tmp_path: Path) -> None:
    best = Best("min", Progress())
    assert best.find(tmp_path, None) is None
    best.offer(2.0, 3, {"a": 2.0})
    checkpoint_path(tmp_path, 3).mkdir()
    best.offer(1.0, 6, {"a": 1.0})
    best.take_back()
    assert (best.value, best.step, best.metrics) == (2.0, 3, {"a": 2.0})
    assert best.find(tmp_path, tmp_path / "last") == checkpoint_path(tmp_path, 3)


def test_best_whose_checkpoint_is_gone_gives_the_last_one(tmp_path: Path) -> None:
    best = Best("min", Progress(best_value=1.0, best_step=4))
    assert best.find(tmp_path, tmp_path / "last") == tmp_path / "last"
