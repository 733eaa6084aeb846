"""`dovetail watch`: a run of another process, followed by its log alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dovetail.cli import watch as watch_module
from dovetail.cli._screen import Screen
from dovetail.cli._story import RunStory
from dovetail.run.tracking.lock import RUN, FolderLock

Run = Callable[..., Result]


def step(number: int, epoch: int = 0, time_s: float | None = None) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "epoch": epoch,
        "items": 8.0,
        "time": time.time() if time_s is None else time_s,
        "metrics": {"train/loss": 1 / number},
    }


def evaluation(number: int) -> dict[str, Any]:
    return {**step(number), "kind": "evaluation", "metrics": {"val/loss": 0.5}}


class LiveRun:
    """A run that writes a further part of its log each time the watcher waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[Callable[[], Any]] = []
        path.mkdir(parents=True)
        self.lock = FolderLock(path, RUN)
        self.lock.acquire()

    def write(self, *records: dict[str, Any], mode: str = "a") -> None:
        with (self.path / "metrics.jsonl").open(mode) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def go_on(self) -> None:
        self.parts.pop(0)()


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    run = LiveRun(tmp_path / "runs" / "tiny" / "one")
    monkeypatch.setattr(watch_module.Watching, "_wait", run.go_on)
    yield run
    run.lock.release()


def end(status: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "end", "status": status, "time": time.time(), **fields}


def test_watch_tells_what_happens_until_the_run_ends(live: LiveRun, run_cli: Run) -> None:
    live.write({"kind": "params", "time": time.time(), "params": {"train.epochs": 2}})
    live.parts = [
        lambda: live.write(step(1), step(2), evaluation(2)),
        lambda: live.write({"kind": "skip", "step": 2, "epoch": 1, "loss": "NaN"}),
        lambda: live.write(step(3, epoch=1), end("completed")),
    ]
    result = run_cli("watch", "one")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"watching {Path('runs/tiny/one')}",
        "epoch 1/2  step 2: train loss 0.5; val loss 0.5",
        "epoch 2/2  step 2: a window was skipped (loss NaN)",
        "completed after step 3",
    ]


@pytest.mark.parametrize(
    ("status", "exit_code"), [("stopped early", 0), ("interrupted", 0), ("failed", 1)]
)
def test_watch_exits_as_the_run_did(
    live: LiveRun, run_cli: Run, status: str, exit_code: int
) -> None:
    live.write(step(1), end(status, error="ValueError: planted"))
    result = run_cli("watch")
    assert result.exit_code == exit_code
    assert result.stdout.splitlines()[-1] == f"{status} after step 1: ValueError: planted"


def test_watch_says_when_the_process_is_gone(live: LiveRun, run_cli: Run) -> None:
    live.write(step(1))
    live.parts = [live.lock.release]
    result = run_cli("watch")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == (
        "the process is gone after step 1; its log has no end"
    )


def test_watch_waits_for_a_log_that_is_not_there_yet(live: LiveRun, run_cli: Run) -> None:
    (live.path / "config.toml").write_text("")
    (live.path / "plugins.lock.json").write_text("")
    live.parts = [lambda: None, lambda: live.write(step(1), end("completed"))]
    assert run_cli("watch").stdout.splitlines()[-1] == "completed after step 1"


def test_watch_says_once_that_nothing_comes(live: LiveRun, run_cli: Run) -> None:
    live.write(step(1, time_s=time.time() - 185))
    live.parts = [lambda: None, lambda: None, lambda: live.write(step(2), end("completed"))]
    lines = run_cli("watch", "--every", "1000").stdout.splitlines()
    assert [line for line in lines if line.startswith("last record 3 min")] == lines[1:2]


def test_watch_tells_inside_an_epoch_how_it_stands(
    live: LiveRun, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.write(step(1, time_s=time.time() - 2))
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: float(next(clock)))
    live.parts = [
        lambda: live.write(step(2)),
        lambda: live.write(step(3)),
        lambda: live.write(end("completed")),
    ]
    lines = run_cli("watch", "--every", "10").stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 3: train loss 0.3333; ")
    assert lines[1].endswith(" items/s")


def test_watch_begins_anew_after_a_resume(live: LiveRun, run_cli: Run) -> None:
    live.write(step(1), step(2), step(3))
    live.parts = [
        lambda: live.write(step(1), step(2, epoch=5), evaluation(2), mode="w"),
        lambda: live.write(end("completed")),
    ]
    lines = run_cli("watch").stdout.splitlines()
    assert "the run was resumed from an earlier checkpoint" in lines
    assert lines[-1] == "completed after step 2"


def test_watch_stops_at_ctrl_c_and_leaves_the_run_alone(live: LiveRun, run_cli: Run) -> None:
    live.write(step(1))

    def interrupt() -> None:
        raise KeyboardInterrupt

    live.parts = [interrupt]
    result = run_cli("watch")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("no longer watched; the run is left alone")


def test_watch_draws_a_bar_at_a_terminal(
    live: LiveRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    live.write(step(1), end("completed"))
    watching = watch_module.Watching(live.path, Screen("live"), 1.0)
    assert watching.run()
    assert "completed after step 1" in capsys.readouterr().out


def test_story_knows_the_end_after_the_first_epoch() -> None:
    story = RunStory({"train.epochs": 3})
    assert story.standing().left == "no record yet"
    now_s = time.time()
    for number in range(1, 11):
        story.take(step(number, epoch=0, time_s=now_s + number))
    assert story.standing().fraction is None
    for number in range(11, 16):
        story.take(step(number, epoch=1, time_s=now_s + number))
    standing = story.standing()
    assert standing.left == "epoch 2/3  step 15/30"
    assert standing.fraction == 0.5
    assert standing.right == "loss 0.06667  8 items/s  15.0 s left"


def test_story_counts_no_pause_into_the_speed() -> None:
    story = RunStory({"train.max_steps": 20})
    story.take(step(1, time_s=1e9))
    story.take({"kind": "params", "time": 2e9, "params": {}})
    story.take(step(2, time_s=time.time()))
    story.take(step(3, time_s=time.time() + 1))
    assert story.standing().right == "loss 0.3333  8 items/s  17.0 s left"
    assert story.silence(time.time() + 1 + 120).startswith("last record ")
