"""What is read from a run's folder: curves, windows, pauses and marks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.run.report import read_history

MakeRun = Callable[..., Path]


def step(number: int, time_s: float, **fields: Any) -> dict[str, Any]:
    metrics = {"train/loss": 1 / number}
    return {"kind": "step", "step": number, "time": time_s, "metrics": metrics, **fields}


def test_history_measures_windows_from_one_record_of_the_loop_to_the_next(
    make_run: MakeRun,
) -> None:
    records = [
        {"kind": "params", "time": 0.0, "params": {}},
        step(1, 10.0, items=8.0, wait_s=9.0),  # begins before the loop does
        step(2, 12.0, items=8.0, wait_s=0.5),
        # Another thread's record does not end a window, an evaluation does.
        {"kind": "system", "step": 2, "time": 13.0, "metrics": {"system/x": 1.0}},
        {"kind": "evaluation", "step": 2, "time": 14.0, "metrics": {"val/loss": 1.0}},
        {"kind": "system", "step": 2, "time": 15.0, "metrics": {"system/x": 1.0}},
        step(3, 18.0, items=8.0, wait_s=1.0),
    ]
    history = read_history(make_run("one", records))
    assert list(history.throughput.steps) == [2, 3]
    assert list(history.throughput.values) == [4.0, 2.0]
    assert list(history.wait.values) == [0.25, 0.25]
    assert history.num_items == 24


def test_history_leaves_pauses_before_a_resume_out_of_the_clock(make_run: MakeRun) -> None:
    records = [
        {"kind": "params", "time": 100.0, "params": {"run.name": "tiny"}},
        step(1, 101.0, items=1.0),
        {"kind": "params", "time": 5000.0, "params": {"run.name": "tiny"}},
        step(2, 5001.0, items=1.0),
        step(3, 5000.5, items=1.0),  # a clock that was set back
        step(4, 5001.5, items=1.0),
    ]
    history = read_history(make_run("one", records))
    assert list(history.series["train/loss"].times_s) == [1.0, 2.0, 2.0, 3.0]
    assert list(history.resumes.steps) == [1.0]
    assert list(history.resumes.times_s) == [1.0]
    assert list(history.throughput.steps) == [4]
    assert history.summary.duration_s == pytest.approx(2.5)
    assert history.settings == {"run.name": "tiny"}


def test_history_marks_skips_and_the_checkpoints_that_are_kept(make_run: MakeRun) -> None:
    records = [
        step(1, 1.0),
        {"kind": "skip", "step": 1, "time": 2.0, "loss": "NaN", "grad_norm": "NaN"},
        step(2, 3.0, metrics={"train/loss": "NaN"}),
    ]
    run = make_run("one", records)
    for name in ("step-000002", "step-000009", ".step-000001.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
    history = read_history(run)
    assert list(history.skips.steps) == [1.0]
    assert list(history.checkpoints.steps) == [2.0]
    assert list(history.checkpoints.times_s) == [2.0]
    assert math.isnan(history.series["train/loss"].values[1])


def test_history_ignores_what_it_does_not_know_and_a_torn_line(make_run: MakeRun) -> None:
    records = [
        step(1, 1.0, novel=3),
        {"kind": "novel", "time": 2.0},
        {"kind": "step", "metrics": {"words": "are no numbers"}},
    ]
    run = make_run("one", records)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"step","step":2')
    history = read_history(run)
    assert list(history.series) == ["train/loss"]
    assert list(history.series["train/loss"].steps) == [1.0]


def test_history_of_a_run_without_a_log_is_empty(tmp_path: Path) -> None:
    history = read_history(tmp_path)
    assert history.series == {}
    assert history.summary.status == "empty"
