"""`dovetail report`: a page of one run or several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dovetail.cli._runs import label_runs

Run = Callable[..., Result]

pytest.importorskip("matplotlib")
# A damaged line of a log is a warning, which the command shows as a line.
pytestmark = pytest.mark.filterwarnings("default:metric log")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one", "b/one"):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        record = {"kind": "step", "step": 1, "time": 1.0, "metrics": {"train/loss": 1.0}}
        (path / "metrics.jsonl").write_text(f"damaged\n{json.dumps(record)}\n")
    return tmp_path / "runs"


def test_report_of_one_run_lies_in_its_folder(runs: Path, run_cli: Run) -> None:
    result = run_cli("report", "a/one")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"report  {Path('runs/a/one/report.html')}\n"
    assert "warning: metric log" in result.stderr
    assert (runs / "a" / "one" / "report.html").is_file()


def test_report_of_several_runs_lies_here_and_pictures_where_they_are_wanted(
    runs: Path, run_cli: Run, tmp_path: Path
) -> None:
    result = run_cli("report", "runs/a/one", "b/one", "b/one", "--png", "pictures")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["report  runs-report.html", "png     1 in pictures"]
    page = (tmp_path / "runs-report.html").read_text()
    assert "a/one" in page
    assert "b/one" in page
    assert (tmp_path / "pictures" / "loss.png").is_file()
    assert run_cli("report", "a/one", "-o", "new/page.html").exit_code == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_report_says_what_it_cannot_find_or_write(runs: Path, run_cli: Run) -> None:
    assert "is the id of several" in run_cli("report", "one").stderr
    (runs / "file").write_text("")
    result = run_cli("report", "a/one", "-o", "runs/file/page.html")
    assert result.exit_code == 1
    assert "--output FILE" in result.stderr


def test_labels_are_as_short_as_they_can_be() -> None:
    assert label_runs([Path("/r/a/one"), Path("/r/a/two")]) == ["one", "two"]
    assert label_runs([Path("/r/a/one"), Path("/r/b/one")]) == ["a/one", "b/one"]
    assert label_runs([Path("/r/a/one")]) == ["one"]
