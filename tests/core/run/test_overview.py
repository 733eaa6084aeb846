"""How runs went, read from the few records that tell it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.run import overview, scan
from dovetail.run.overview import list_runs, summarize_run
from dovetail.run.tracking.lock import RUN, FolderLock

Write = Callable[..., Path]


def step(number: int, **metrics: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "time": float(number), "metrics": metrics}


def evaluation(number: int, **metrics: Any) -> dict[str, Any]:
    return {**step(number, **metrics), "kind": "evaluation"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*records: dict[str, Any], name: str = "one", blanks: bool = False) -> Path:
        path = tmp_path / "tiny" / name
        path.mkdir(parents=True)
        separators = (", ", ": ") if blanks else (",", ":")
        lines = "".join(json.dumps(r, separators=separators) + "\n" for r in records)
        (path / "metrics.jsonl").write_text(lines)
        return path

    return make


PARAMS = {
    "kind": "params",
    "time": 0.0,
    "params": {"run.name": "digits", "train.monitor": "val/f1", "train.monitor_mode": "max"},
}


@pytest.mark.parametrize("blanks", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1 << 22, 300])
def test_summary_tells_how_a_run_went(
    write: Write, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, blanks: bool
) -> None:
    monkeypatch.setattr(scan, "_CHUNK_BYTES", chunk_bytes)
    records = [
        PARAMS,
        step(1, loss=2.0),
        evaluation(1, **{"val/f1": "NaN"}),
        evaluation(2, **{"val/f1": 0.25, "val/loss": 3.0}),
        evaluation(3, **{"val/f1": 0.75, "val/loss": 1.0}),
        {**PARAMS, "time": 1000.0},
        {**evaluation(4, **{"val/loss": 2.0, "val/f1": 0.75}), "time": 1001.0},
        {**step(5, loss=1.5), "time": 1002.0},
        {"kind": "system", "step": 5, "time": 1003.0, "metrics": {"system/x": 1.0}},
        {"kind": "end", "status": "failed", "time": 1004.0, "error": "ValueError: bad"},
    ]
    run = summarize_run(write(*records, blanks=blanks))
    assert (run.name, run.id, run.status, run.error) == (
        "digits",
        "one",
        "failed",
        "ValueError: bad",
    )
    assert run.num_steps == 5
    assert (run.monitor, run.best_value, run.best_step) == ("val/f1", 0.75, 3)
    assert run.best_metrics == {"val/f1": 0.75, "val/loss": 1.0}
    assert run.last_metrics == {"loss": 1.5, "val/loss": 2.0, "val/f1": 0.75}
    assert run.started_s == 0.0
    assert run.duration_s == 1004.0 - (1000.0 - 3.0)
    assert run.num_resumes == 1


def test_summary_finds_the_monitor_in_the_config_and_in_step_records(tmp_path: Path) -> None:
    lines = [json.dumps(step(n, **{"train/loss": v})) for n, v in ((1, 3.0), (2, 1.0), (3, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind":"st')
    (tmp_path / "config.toml").write_text('[train]\nmonitor = "train/loss"\n')
    run = summarize_run(tmp_path)
    assert (run.best_value, run.best_step, run.num_steps) == (1.0, 2, 3)
    assert run.name == tmp_path.parent.name


def test_summary_of_a_folder_without_records_is_empty(write: Write, tmp_path: Path) -> None:
    assert summarize_run(tmp_path / "absent").status == "empty"
    path = write()
    FolderLock(path, RUN).path.write_text("")
    run = summarize_run(path)
    assert (run.status, run.duration_s, run.best_value, run.num_steps) == ("empty", None, None, 0)


def test_status_without_an_end_is_running_while_the_lock_is_held(write: Write) -> None:
    pytest.importorskip("fcntl")
    path = write(PARAMS, step(1, loss=1.0))
    code = (
        "import sys, pathlib; from dovetail.run.tracking.lock import *\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), RUN); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        assert summarize_run(path).status == "running"
        holder.kill()
    assert summarize_run(path).status == "crashed"


def test_status_without_a_lock_goes_by_the_age_of_the_log(write: Write) -> None:
    path = write(step(1, loss=1.0))
    assert summarize_run(path).status == "running"
    os.utime(path / "metrics.jsonl", (0, 0))
    assert summarize_run(path).status == "crashed"


def test_list_is_sorted_by_time_and_knows_each_status(write: Write, tmp_path: Path) -> None:
    for name, time_s, status in (("b", 5.0, "completed"), ("a", 9.0, "interrupted")):
        begin = {**PARAMS, "time": time_s}
        write(begin, {"kind": "end", "status": status, "time": time_s + 1}, name=name)
    runs = list_runs(tmp_path)
    assert [(run.id, run.status) for run in runs] == [("b", "completed"), ("a", "interrupted")]
    assert {run.status for run in runs} <= set(overview.STATUSES)


def test_scan_parses_only_what_matters(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [step(n, **{"train/loss": 1.0}) for n in range(1, 1000)]
    path = write(PARAMS, *many, evaluation(999, **{"val/f1": 0.5}))
    num_parsed = 0
    parse = scan.parse_record

    def count(line: bytes) -> dict[str, Any] | None:
        nonlocal num_parsed
        num_parsed += 1
        return parse(line)

    monkeypatch.setattr(scan, "parse_record", count)
    assert summarize_run(path).best_value == 0.5
    assert num_parsed < 12
