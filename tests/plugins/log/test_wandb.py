from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dovetail.errors import ConfigError, MissingDependencyError
from dovetail.types import RunInfo, Tracker
from dovetail_plugins.log import wandb as plugin
from dovetail_plugins.log import wandb_run
from dovetail_plugins.log.wandb import Options, dovetail_log
from dovetail_plugins.log.wandb_file import (
    find_wandb_files,
    parse_history,
    read_history,
    read_records,
)
from dovetail_plugins.log.wandb_rows import wait_until_written

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("wandb_home")

METRICS = ("train/loss", "train/lr", "val/accuracy")
NUM_ROWS = 250


def records(file: Path) -> list[dict[str, Any]]:
    """Return what the tests look at of each record of a `.wandb` file, once it is complete."""
    wait_until_written([file], timeout_s=60)
    found = []
    for record in read_records(file):
        kind = record.WhichOneof("record_type")
        entry: dict[str, Any] = {"type": kind}
        if kind == "history":
            entry["item"] = parse_history(record).values
        elif kind == "exit":
            entry["exit_code"] = record.exit.exit_code
        elif kind == "config":
            entry["update"] = {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "run":
            names = ("project", "run_id", "run_group", "job_type", "notes", "tags")
            entry |= {name: getattr(record.run, name) for name in names}
        elif kind == "metric":
            names = ("name", "glob_name", "step_metric", "summary")
            entry |= {name: getattr(record.metric, name) for name in names}
        found.append(entry)
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all processes that fed the run in a folder."""
    files = find_wandb_files(folder / "wandb")
    wait_until_written(files, timeout_s=60)
    return [dict(row.values) for file in files for row in read_history(file)]


def value_of(step: int, metric: int) -> float:
    return step / 7 + metric


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Follow one offline run to its end; return its folder and what W&B's file holds of it."""
    folder = tmp_path_factory.mktemp("run")
    run = RunInfo(name="digits/v2", id="2026:01#a", directory=folder, params={})
    tracker = dovetail_log(
        run, Options(mode="offline", group="sweep", tags=("a", "b"), notes="Why.", job_type="train")
    )
    assert isinstance(tracker, Tracker)
    assert wandb.run is None
    tracker.log_params({"train.lr": 0.1, "log.use": ["wandb"]})
    tracker.log_params({"train.lr": 0.2})
    for step in range(1, NUM_ROWS + 1):
        tracker.log({name: value_of(step, k) for k, name in enumerate(METRICS)}, step)
    # A run that was resumed comes back to steps that it has been at already.
    tracker.log({"train/loss": 3.5}, 200)
    tracker.log({"train/loss": math.nan, "train/lr": math.inf, "val/accuracy": -math.inf}, 201)
    picture = folder / "figure.png"
    Image.new("RGB", (4, 3)).save(picture)
    tracker.log_figure("report/confusion", picture, 202)
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    tracker.log_artifact("bundle", bundle)
    tracker.log_artifact("report: final", picture)
    tracker.close("failed")
    tracker.close("failed")
    (file,) = folder.rglob("*.wandb")
    return folder, records(file)


def test_tracker_leaves_every_value_in_the_file(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    rows = [record["item"] for record in finished[1] if record["type"] == "history"]
    assert len(rows) == NUM_ROWS + 3
    for step, row in enumerate(rows[:NUM_ROWS], start=1):
        assert row["optimizer_step"] == step
        assert [row[name] for name in METRICS] == [value_of(step, k) for k in range(3)]


def test_tracker_keeps_rows_whose_step_goes_back(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    rows = [record["item"] for record in finished[1] if record["type"] == "history"]
    assert (rows[NUM_ROWS]["optimizer_step"], rows[NUM_ROWS]["train/loss"]) == (200, 3.5)


def test_tracker_keeps_values_that_are_not_finite(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    rows = [record["item"] for record in finished[1] if record["type"] == "history"]
    values = [float(rows[NUM_ROWS + 1][name]) for name in METRICS]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


def test_tracker_makes_the_optimizer_step_the_axis(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    metrics = [record for record in finished[1] if record["type"] == "metric"]
    axes = {record["glob_name"]: record["step_metric"] for record in metrics}
    assert axes["*"] == "optimizer_step"


def test_tracker_summarises_losses_by_their_least_value(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    metrics = [record for record in finished[1] if record["type"] == "metric"]
    by_name = {record["name"]: record for record in metrics if record["summary"].min}
    assert set(by_name) == {"train/loss"}
    assert by_name["train/loss"]["summary"].last
    assert by_name["train/loss"]["step_metric"] == "optimizer_step"


def test_tracker_numbers_the_rows_without_a_gap(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    rows = [record["item"] for record in finished[1] if record["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(NUM_ROWS + 3))


def test_tracker_names_the_run_and_escapes_what_wandb_refuses(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    run = next(record for record in finished[1] if record["type"] == "run")
    assert (run["project"], run["run_id"]) == ("digits-v2", "2026-01-a")
    assert (run["run_group"], sorted(run["tags"])) == ("sweep", ["a", "b"])
    assert (run["notes"], run["job_type"]) == ("Why.", "train")


def test_log_params_replaces_settings(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    settings: dict[str, Any] = {}
    for record in finished[1]:
        if record["type"] == "config":
            settings |= record["update"]
    assert settings["train.lr"] == 0.2
    assert settings["log.use"] == ["wandb"]


def test_log_figure_keeps_the_picture(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = finished
    row = [record["item"] for record in found if record["type"] == "history"][-1]
    assert row["optimizer_step"] == 202
    (copied,) = (folder / "wandb").rglob("media/images/report/*.png")
    assert copied.read_bytes() == (folder / "figure.png").read_bytes()


def test_log_artifact_records_files_and_folders(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    kinds = [record["type"] for record in finished[1]]
    assert kinds.count("artifact") == 2


def test_close_records_the_exit(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [r["exit_code"] for r in finished[1] if r["type"] == "exit"] == [1]


def test_tracker_writes_into_its_own_folder(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert {path.name for path in finished[0].iterdir()} == {"wandb", "figure.png", "bundle"}


def test_tracker_uploads_no_code(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    assert not list(finished[0].rglob("*.py"))
    assert not list(finished[0].rglob("*.patch"))


def test_options_have_help_for_every_field() -> None:
    assert all(field.description for field in Options.model_fields.values())
    assert plugin.dovetail_api == 1


def test_disabled_run_takes_everything_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunInfo(name="digits", id="a", directory=tmp_path / "run", params={})
    tracker = dovetail_log(run, Options(mode="disabled"))
    tracker.log_params({"train.lr": 0.1})
    tracker.log({"loss": 1.0}, 1)
    tracker.close("interrupted")
    assert not list(tmp_path.rglob("*.wandb"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "offline", "disabled"),
    ],
)
def test_environment_can_only_take_a_run_offline(
    monkeypatch: pytest.MonkeyPatch, mode: plugin.Mode, environment: str | None, expected: str
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_run.effective_mode(mode) == expected


def test_online_run_without_a_login_says_what_to_do(tmp_path: Path) -> None:
    run = RunInfo(name="digits", id="a", directory=tmp_path, params={})
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY.*wandb login.*mode = \"offline\""):
        dovetail_log(run, Options(mode="online"))
    assert not sys.stdin.closed


def test_online_run_without_a_login_asks_nobody_at_a_terminal(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from dovetail.errors import ConfigError
from dovetail.types import RunInfo
from dovetail_plugins.log import wandb_run
from dovetail_plugins.log.wandb import Options, dovetail_log
from dovetail_plugins.log.wandb_file import (
    find_wandb_files,
    parse_history,
    read_history,
    read_records,
)
from dovetail_plugins.log.wandb_rows import wait_until_written
import sys
assert sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()
try:
    dovetail_log(RunInfo("a", "b", Path({str(tmp_path)!r}), {{}}), Options())
except ConfigError as error:
    Path({str(tmp_path / "message")!r}).write_text(str(error))
"""
    terminal, end = pty.openpty()
    try:
        command = [sys.executable, "-c", script]
        subprocess.run(command, stdin=end, stdout=end, stderr=end, timeout=60, check=True)
    finally:
        os.close(end)
        os.close(terminal)
    assert "WANDB_API_KEY" in (tmp_path / "message").read_text()


def test_hook_names_the_extra_when_wandb_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = RunInfo(name="digits", id="a", directory=tmp_path, params={})
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[wandb\]"'):
        dovetail_log(run, Options())


def test_tracker_promises_figures_only_where_pillow_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunInfo(name="digits", id="a", directory=tmp_path, params={})
    tracker = dovetail_log(run, Options(mode="disabled"))
    rest = {"params", "artifacts", "texts", "histograms"}
    assert tracker.capabilities == rest | {"figures"}
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    assert tracker.capabilities == rest
    tracker.close("completed")
