"""`dovetail runs`: a table of runs, and runs side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, (name, loss, status) in enumerate(
        (("one", 0.5, "completed"), ("two", 0.25, "stopped early"), ("three", "NaN", "failed"))
    ):
        path = tmp_path / "runs" / "tiny" / name
        path.mkdir(parents=True)
        metrics = {"val/loss": loss, "val/accuracy": 0.9, "val/other": number}
        records = [
            {"kind": "params", "time": 100.0 * number, "params": {"run.name": "tiny"}},
            {
                "kind": "evaluation",
                "step": 7,
                "time": 100.0 * number + 90,
                "metrics": metrics,
            },
            {"kind": "end", "status": status, "time": 100.0 * number + 95},
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (path / "config.toml").write_text(f"[train]\nlr = 0.{number}\nepochs = 3\n")
    return tmp_path / "runs"


def test_runs_prints_a_table_in_80_columns(runs: Path, run_cli: Run) -> None:
    result = run_cli("runs")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny: val/loss, the smaller the better"
    assert lines[1].split()[:6] == ["RUN", "STATUS", "STEPS", "BEST", "LAST", "TOOK"]
    assert lines[2] == ("one    completed      7      0.5   0.5   1 min 35 s  1970-01-01 00:00")
    assert [line.split()[0] for line in lines[2:]] == ["one", "two", "three"]
    assert lines[4].split()[3:5] == ["-", "nan"]
    assert max(map(len, lines)) <= 80


def test_runs_filters_before_and_behind_the_folder(runs: Path, run_cli: Run) -> None:
    for arguments in (
        ("runs", "--status", "failed", "runs/tiny"),
        ("runs", "runs/tiny", "--status", "failed"),
    ):
        lines = run_cli(*arguments).stdout.splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["three"]
    result = run_cli("runs", "--name", "other", "--status", "failed")
    assert result.stdout == "There is no run (failed other) in runs.\n"
    assert run_cli("runs", "--status", "fine").exit_code == 2


def test_runs_prints_json(runs: Path, run_cli: Run) -> None:
    for arguments in (("runs", "--json"), ("runs", "runs", "--json")):
        rows = json.loads(run_cli(*arguments).stdout)
        assert [row["best_value"] for row in rows] == [0.5, 0.25, None]
        assert rows[2]["last_metrics"]["val/loss"] == "NaN"
        assert rows[1]["status"] == "stopped early"
        assert rows[0]["duration_s"] == 95.0


def test_runs_says_when_there_is_no_such_folder(runs: Path, run_cli: Run) -> None:
    result = run_cli("runs", "comparr")
    assert result.exit_code == 2
    assert "'comparr' is neither a folder nor one of the commands compare" in result.stderr
    (runs.parent / "empty").mkdir()
    assert run_cli("runs", "empty").stdout == "There is no run in empty.\n"


def test_compare_marks_the_better_and_shows_what_differs(runs: Path, run_cli: Run) -> None:
    result = run_cli("runs", "compare", "one", "two")
    assert result.exit_code == 0, result.output
    rows = {line[:19].strip(): line[19:].split() for line in result.stdout.splitlines()}
    assert rows["best val/loss"] == ["0.5", "0.25", "*"]
    assert rows["last val/accuracy"] == ["0.9", "0.9"]
    assert rows["last val/other"] == ["0", "1"]
    assert "train.lr  0.0  0.1" in result.stdout
    assert "epochs" not in result.stdout

    result = run_cli("runs", "compare", "one", "two", "three", "--json")
    told = json.loads(result.stdout)
    assert told["metrics"]["last"]["val/loss"] == {"values": [0.5, 0.25, "NaN"], "better": 1}
    assert told["settings"] == {"train.lr": [0.0, 0.1, 0.2]}
    assert [run["label"] for run in told["runs"]] == ["one", "two", "three"]


def test_compare_of_long_names_gives_each_value_a_line(runs: Path, run_cli: Run) -> None:
    names = []
    for name in ("one", "two"):
        path = runs / "tiny" / f"{name}-{'x' * 40}"
        (runs / "tiny" / name).rename(path)
        names.append(path.name)
    lines = run_cli("runs", "compare", *names).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    place = lines.index("best val/loss")
    assert lines[place + 2].split() == [names[1], "0.25", "*"]


def test_compare_needs_two_runs(runs: Path, run_cli: Run) -> None:
    result = run_cli("runs", "compare", "one", "runs/tiny/../tiny/one/")
    assert result.exit_code == 2
    assert "got one run; expected two or more" in result.stderr


def test_runs_imports_no_heavy_library(runs: Path) -> None:
    code = (
        "import sys\nfrom dovetail.cli._group import cli\n"
        "try:\n    cli(['runs'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'matplotlib', 'numpy', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


def test_commands_take_the_folder_of_a_loop_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Run
) -> None:
    from dovetail import MetricsTracker

    monkeypatch.chdir(tmp_path)
    for name, loss in (("one", 0.5), ("two", 0.25)):
        with MetricsTracker(directory=tmp_path / "runs" / "own" / name) as tracker:
            for number in range(4):
                tracker.log_scalar("train/loss", loss / (number + 1))
            tracker.log_epoch(0, {}, {"loss": loss})
    lines = run_cli("runs").stdout.splitlines()
    told = [(line.split()[0], line.split()[1], line.split()[3]) for line in lines[2:]]
    assert told == [("one", "completed", "0.5"), ("two", "completed", "0.25")]
    assert "0.25 *" in run_cli("runs", "compare", "one", "two").stdout
    assert run_cli("watch", "one").stdout.splitlines()[-1].startswith("completed after step")
