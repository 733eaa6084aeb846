"""A run's progress in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli import _watch
from dovetail.cli._watch import RunWatcher, spell_count, spell_metrics
from dovetail.run.observer import RunPlan

RUN = Path("runs/a/1")
STEP = {"train/loss": 0.5, "train/lr": 0.1, "train/grad_norm": 2.0, "train/items": 8.0}


class Clock:
    """Stands in for `time`, so that a test takes the time it says."""

    now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_watch, "time", made)
    return made


@pytest.fixture
def lines() -> list[str]:
    return []


def start(
    lines: list[str],
    *,
    heartbeat_s: float | None = None,
    batches: int | None = 4,
    first_epoch: int = 0,
) -> RunWatcher:
    watcher = RunWatcher(lines.append, heartbeat_s)
    steps = None if batches is None else 3 * batches
    watcher.on_start(RunPlan("a", "cpu", 1234567, 3, batches, steps, first_epoch), RUN)
    lines.clear()
    return watcher


def test_watcher_tells_what_the_run_is_about_to_do(lines: list[str]) -> None:
    RunWatcher(lines.append).on_start(RunPlan("a", "cpu", 1234567, 3, 4, 12), RUN)
    assert lines == [f"run {RUN}", "1,234,567 parameters on cpu; 12 steps in 3 epochs"]


def test_watcher_tells_where_a_resumed_run_goes_on(lines: list[str]) -> None:
    RunWatcher(lines.append).on_start(RunPlan("a", "cpu", 7, 1, None, None, 2), RUN)
    assert lines[1] == "7 parameters on cpu; 1 epoch, from epoch 3"


def test_watcher_prints_a_line_per_epoch_with_its_evaluation(
    lines: list[str], clock: Clock
) -> None:
    watcher = start(lines)
    for epoch in (0, 1):
        for batch in range(1, 5):
            clock.now_s += 1
            watcher.on_step(epoch, batch, 4 * epoch + batch, STEP)
        watcher.on_evaluation(epoch, 4, {"val/loss": 0.25, "val/accuracy": 0.75})
        assert len(lines) == epoch
        watcher.on_checkpoint(Path("step"), is_best=epoch == 1)
    watcher.finish()
    assert lines == [
        "epoch 1/3: train loss 0.5; val loss 0.25, accuracy 0.75; 4.0 s",
        "epoch 2/3: train loss 0.5; val loss 0.25, accuracy 0.75; 4.0 s, best",
    ]


def test_watcher_prints_no_line_for_a_checkpoint_inside_an_epoch(lines: list[str]) -> None:
    watcher = start(lines)
    watcher.on_step(0, 2, 2, STEP)
    watcher.on_checkpoint(Path("step"), is_best=False)
    assert lines == []


def test_watcher_prints_a_line_per_epoch_when_there_is_no_evaluation(lines: list[str]) -> None:
    watcher = start(lines)
    watcher.on_step(0, 4, 4, STEP)
    watcher.on_checkpoint(Path("step"), is_best=False)
    watcher.finish()
    assert [line.partition(";")[0] for line in lines] == ["epoch 1/3: train loss 0.5"]


def test_watcher_prints_a_line_per_epoch_when_the_data_have_no_length(lines: list[str]) -> None:
    watcher = start(lines, batches=None)
    watcher.on_step(0, 3, 3, STEP)
    watcher.on_checkpoint(Path("step"), is_best=False)
    watcher.on_step(1, 1, 4, STEP)
    watcher.finish()
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3"]


def test_watcher_says_so_when_an_epoch_is_left_in_the_middle(lines: list[str]) -> None:
    watcher = start(lines)
    watcher.on_step(0, 2, 2, STEP)
    watcher.finish()
    assert lines[0].endswith(", unfinished")


def test_watcher_prints_an_evaluation_that_a_resumed_run_begins_with(lines: list[str]) -> None:
    watcher = start(lines, first_epoch=1)
    watcher.on_evaluation(1, 8, {"val/loss": 0.25})
    watcher.on_checkpoint(Path("step"), is_best=True)
    assert lines == ["epoch 2/3: val loss 0.25; 0.0 s, best"]


def test_watcher_beats_no_more_often_than_asked(lines: list[str], clock: Clock) -> None:
    watcher = start(lines, heartbeat_s=10, batches=1000)
    for step in range(1, 61):
        clock.now_s += 1
        watcher.on_step(0, step, step, STEP)
    assert len(lines) == 6
    assert lines[-1] == "epoch 1/3  step 60/3000  loss 0.5  8 items/s  49 min 0 s left"


def test_watcher_does_not_beat_when_a_bar_shows_it(lines: list[str], clock: Clock) -> None:
    watcher = start(lines)
    clock.now_s += 1e6
    watcher.on_step(0, 1, 1, STEP)
    assert lines == []


def test_standing_counts_speed_from_the_end_of_the_first_step(
    lines: list[str], clock: Clock
) -> None:
    watcher = start(lines, batches=100)
    clock.now_s += 1000  # a compilation, say
    watcher.on_step(0, 1, 1, STEP)
    assert "items/s" not in watcher.standing().right
    clock.now_s += 2
    watcher.on_step(0, 2, 2, STEP)
    assert watcher.standing().right == "loss 0.5  4 items/s  9 min 56 s left"
    assert watcher.standing().fraction == pytest.approx(2 / 300)


def test_standing_tells_steps_per_second_when_items_are_not_told(
    lines: list[str], clock: Clock
) -> None:
    watcher = start(lines, batches=None)
    for step in (1, 2):
        clock.now_s += 0.25
        watcher.on_step(0, step, step, {"train/loss": 1.0})
    standing = watcher.standing()
    assert (standing.left, standing.right) == ("epoch 1/3  step 2", "loss 1  4 steps/s")
    assert standing.fraction is None


def test_standing_tells_the_stage(lines: list[str]) -> None:
    assert RunWatcher(lines.append).standing().left == "preparing"
    watcher = start(lines)
    assert watcher.standing().left == "first step"
    watcher.on_step(0, 4, 4, STEP)
    assert watcher.standing().right == "loss 0.5  evaluating"
    watcher.on_export("onnx", "proof")
    assert watcher.standing().left == "onnx: proving"
    assert lines == ["onnx: proving"]


def test_metrics_are_grouped_by_split() -> None:
    metrics = {**STEP, "val/loss": 1 / 3, "val/perplexity": float("inf"), "own": 1e-9}
    told = "train loss 0.5; val loss 0.3333, perplexity inf; own 1e-09"
    assert spell_metrics(metrics) == told


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.1234, "0.123"), (12.34, "12.3"), (987.6, "988"), (9999, "9999"), (12345, "12.3k")],
)
def test_count_keeps_the_digits_that_matter(number: float, text: str) -> None:
    assert spell_count(number) == text
    assert spell_count(3.456e7) == "34.6M"
