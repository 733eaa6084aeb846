from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.types import RunInfo
from dovetail_plugins.log.wandb import Options, dovetail_log
from dovetail_plugins.log.wandb_file import find_wandb_files, read_history, read_records
from dovetail_plugins.log.wandb_rows import wait_until_written

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("wandb_home")


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(name="digits", id="run-1", directory=tmp_path / "run", params={})


def open_run(folder: Path, run_id: str = "mine") -> Any:
    """Open a run as a program does in its own code."""
    return wandb.init(
        project="mine",
        id=run_id,
        mode="offline",
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """The run that the program has open itself."""
    made = open_run(tmp_path)
    yield made
    made.finish()


def rows_in(folder: Path) -> list[dict[str, Any]]:
    files = find_wandb_files(folder / "wandb")
    wait_until_written(files, timeout_s=60)
    return [dict(row.values) for file in files for row in read_history(file)]


def test_tracker_needs_the_training_process_only_where_a_run_is_open(tmp_path: Path) -> None:
    assert not Options().needs_training_process
    opened = open_run(tmp_path)
    assert Options().needs_training_process
    assert not Options(use_open_run=False).needs_training_process
    opened.finish()
    assert not Options().needs_training_process


def test_tracker_logs_into_the_open_run_and_leaves_it_open(
    run: RunInfo, opened: Any, tmp_path: Path
) -> None:
    opened.define_metric("mine/*", step_metric="mine/step")
    opened.log({"mine/loss": 0.25, "mine/step": 1})
    tracker = dovetail_log(run, Options(project="other", mode="online"))
    tracker.log_params({"train.lr": 0.1})
    for step in range(1, 4):
        tracker.log({"train/loss": step / 7, "train/lr": 0.5}, step)
        opened.log({"mine/loss": 0.5, "mine/step": step})
    tracker.log_text("sample", "text", 3)
    tracker.close("completed")
    assert wandb.run is opened
    opened.log({"mine/last": 1.0})
    opened.finish()
    rows = rows_in(tmp_path)
    assert [row["optimizer_step"] for row in rows if "optimizer_step" in row] == [1, 2, 3, 3]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1 / 7, 2 / 7, 3 / 7]
    assert [row["mine/loss"] for row in rows if "mine/loss" in row] == [0.25, 0.5, 0.5, 0.5]
    assert rows[-1]["mine/last"] == 1.0
    assert opened.config["train.lr"] == 0.1
    assert not run.directory.exists()


def test_tracker_gives_only_its_own_names_the_optimizer_step_as_axis(
    run: RunInfo, opened: Any, tmp_path: Path
) -> None:
    tracker = dovetail_log(run, Options())
    tracker.log({"train/loss": 1.0, "train/lr": 0.5}, 1)
    tracker.close("completed")
    opened.finish()
    (file,) = find_wandb_files(tmp_path / "wandb")
    wait_until_written([file], timeout_s=60)
    metrics = [r.metric for r in read_records(file) if r.WhichOneof("record_type") == "metric"]
    axes = {metric.name: metric.step_metric for metric in metrics if metric.step_metric}
    assert axes == {"train/loss": "optimizer_step", "train/lr": "optimizer_step"}
    assert not any(metric.glob_name for metric in metrics)


def test_tracker_knows_what_earlier_processes_logged_into_the_open_run(
    run: RunInfo, tmp_path: Path
) -> None:
    for num in (5, 8):
        opened = open_run(tmp_path)
        tracker = dovetail_log(run, Options())
        for step in range(num):
            tracker.log({"loss": step / 7}, step)
        tracker.close("failed")
        opened.finish()
        rows_in(tmp_path)
    assert [row["optimizer_step"] for row in rows_in(tmp_path)] == list(range(8))


def test_tracker_opens_its_own_run_beside_where_it_is_asked_to(
    run: RunInfo, opened: Any, tmp_path: Path
) -> None:
    tracker = dovetail_log(run, Options(mode="offline", use_open_run=False))
    tracker.log({"loss": 1.0}, 1)
    tracker.close("completed")
    assert wandb.run is opened
    opened.log({"mine": 1.0})
    opened.finish()
    assert [row["loss"] for row in rows_in(run.directory)] == [1.0]
    assert [row["mine"] for row in rows_in(tmp_path)] == [1.0]


def test_tracker_takes_a_disabled_run_for_open(run: RunInfo, tmp_path: Path) -> None:
    opened = wandb.init(mode="disabled", dir=str(tmp_path))
    tracker = dovetail_log(run, Options())
    tracker.log({"loss": 1.0}, 1)
    tracker.close("completed")
    opened.finish()
    assert not list(tmp_path.rglob("*.wandb"))
