from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail.errors import RunError
from dovetail.run.tracking import (
    LOG_NAME,
    MetricLog,
    parse_record,
    read_metrics,
    read_records,
)


def step_record(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": metrics or {"train/loss": float(step)}}


def write_steps(log: MetricLog, steps: range, **metrics: float) -> None:
    for step in steps:
        log.write(step_record(step, **metrics))


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricLog]:
    made = MetricLog(tmp_path)
    yield made
    made.close()


# --- the log


def test_every_record_is_on_the_disk_before_write_returns(log: MetricLog) -> None:
    for step in range(3):
        log.write(step_record(step))
        lines = log.path.read_bytes().splitlines(keepends=True)
        assert len(lines) == step + 1
        assert lines[-1].endswith(b"\n")
        assert json.loads(lines[-1]) == step_record(step)


def test_a_log_that_exists_is_continued(tmp_path: Path) -> None:
    for step in range(3):
        again = MetricLog(tmp_path)
        again.write(step_record(step))
        again.close()
    assert steps_of(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("torn", [b"{", b'{"kind":"st', b"\x00\x00\x00", b'{"step":9}'])
def test_a_last_line_torn_by_a_crash_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    whole = b'{"kind":"step","step":0}\n'
    (tmp_path / LOG_NAME).write_bytes(whole + torn)
    assert steps_of(tmp_path) == [0]
    log = MetricLog(tmp_path)
    log.write(step_record(1))
    log.close()
    assert steps_of(tmp_path) == [0, 1]


def test_a_log_that_is_nothing_but_a_torn_line_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_bytes(b'{"kind')
    log = MetricLog(tmp_path)
    log.write(step_record(0))
    log.close()
    assert steps_of(tmp_path) == [0]


metrics = st.dictionaries(st.text(max_size=8), st.floats(), max_size=4)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(metrics, max_size=5))
@pytest.mark.filterwarnings("ignore:metric .* for the first time")
def test_whatever_the_metrics_are_they_are_read_back_from_strict_json(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]]
) -> None:
    log = MetricLog(tmp_path_factory.mktemp("log"))
    for step, row in enumerate(rows):
        log.write({"kind": "step", "step": step, "metrics": row})
    log.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    found = [record["metrics"] for record in read_records(log.path)]
    np.testing.assert_equal(found, rows)


def test_each_metric_warns_once_when_it_is_first_not_finite(log: MetricLog) -> None:
    with pytest.warns(UserWarning, match="metric 'a' is nan for the first time") as caught:
        write_steps(log, range(3), a=math.nan, b=1.0)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="metric 'b' is -inf for the first time, at step 3"):
        log.write(step_record(3, a=math.inf, b=-math.inf))
    rows = [record["metrics"] for record in read_records(log.path)]
    assert rows[3] == {"a": math.inf, "b": -math.inf}
    assert [math.isnan(row["a"]) for row in rows] == [True, True, True, False]


def test_a_record_beside_the_metrics_is_spelled_without_a_warning(log: MetricLog) -> None:
    log.write({"kind": "skip", "step": 0, "loss": math.nan, "grad_norm": None})
    assert json.loads(log.path.read_text())["loss"] == "NaN"


def test_a_full_disk_stops_nothing_and_warns_once(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    log = MetricLog(tmp_path)
    write_steps(log, range(10))
    size = log.tell()

    def fill_and_close() -> None:
        write_steps(log, range(10, 500))
        assert log.tell() == log.path.stat().st_size == size
        log.close()
        log.close()

    match = "cannot be written|could not be written"
    with pytest.warns(UserWarning, match=match) as caught, full_disk(size + 20):
        fill_and_close()
    warning, at_the_end = caught
    assert "lacks 490 records that could not be written" in str(at_the_end.message)
    assert str(warning.message).startswith(f"metric log {str(log.path)!r}: cannot be written: File")
    assert "the run goes on without its records" in str(warning.message)
    assert log.num_lost == 490
    assert steps_of(tmp_path) == list(range(10))


def test_a_disk_with_room_again_gets_whole_lines(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    log = MetricLog(tmp_path)
    with pytest.warns(UserWarning, match="cannot be written"), full_disk(20):
        write_steps(log, range(500))
    write_steps(log, range(500, 510))
    with pytest.warns(UserWarning, match="lacks 500 records"):
        log.close()
    assert steps_of(tmp_path) == list(range(500, 510))


def test_threads_write_whole_lines(log: MetricLog) -> None:
    def write(first: int) -> None:
        write_steps(log, range(first, first + 200), **{f"metric/{n}": 1.0 for n in range(20)})

    threads = [threading.Thread(target=write, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = steps_of(log.path)
    assert sorted(steps) == [1000 * n + k for n in range(4) for k in range(200)]
    assert log.tell() == log.path.stat().st_size


def test_a_second_writer_of_a_folder_is_refused(log: MetricLog) -> None:
    directory = log.path.parent
    with pytest.raises(RunError, match=rf"is in use by process {os.getpid()}; expected one"):
        MetricLog(directory)
    log.close()
    MetricLog(directory).close()


def test_a_second_process_on_a_folder_is_refused(log: MetricLog) -> None:
    code = (
        "import sys; from pathlib import Path; from dovetail.run.tracking import MetricLog\n"
        "MetricLog(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(log.path.parent)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f"is in use by process {os.getpid()}; expected one process per run" in refused.stderr
    log.close()
    subprocess.run(command, check=True)


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metric log '.*': cannot be written: No such file"):
        MetricLog(tmp_path / "nosuch")
    (tmp_path / LOG_NAME).mkdir()
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        MetricLog(tmp_path)


def test_rewind_drops_what_a_resumed_run_writes_again(log: MetricLog) -> None:
    for step in range(2):
        log.write(step_record(step))
    size = log.tell()
    for step in range(2, 5):
        log.write(step_record(step))
    log.rewind(size)
    log.write(step_record(7))
    assert steps_of(log.path) == [0, 1, 7]


def test_rewind_to_more_than_there_is_adds_nothing(log: MetricLog) -> None:
    log.write(step_record(0))
    log.rewind(10**6)
    log.write(step_record(1))
    assert steps_of(log.path) == [0, 1]


def test_a_log_can_be_read_while_it_is_written(log: MetricLog) -> None:
    log.write(step_record(0))
    reader = read_records(log.path)
    assert next(reader)["step"] == 0
    log.write(step_record(1))
    with log.path.open("ab") as file:
        file.write(b'{"half')
    assert steps_of(log.path.parent) == [0, 1]


def test_a_damaged_line_is_left_out_with_a_warning(log: MetricLog) -> None:
    log.write(step_record(0))
    with log.path.open("ab") as file:
        file.write(b"\x00\x00{\n")
        file.write(b"[1]\n")
    log.write(step_record(1))
    with pytest.warns(UserWarning, match=r"metric log '.*' line [23]: holds no record") as caught:
        assert steps_of(log.path) == [0, 1]
    assert len(caught) == 2
    assert parse_record(b"not json\n") is None
    assert parse_record(b'{"metrics": [1]}\n') is None


def test_a_missing_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"metric log '.*metrics.jsonl': cannot be read: No such file"
    ):
        read_metrics(tmp_path)


def test_all_records_survive_when_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from dovetail.run.tracking import MetricLog\n"
        "log = MetricLog(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1000):\n"
        "    log.write({'kind': 'step', 'step': step, 'metrics': {'loss': 1.0 / (step + 1)}})\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert steps_of(tmp_path) == list(range(1000))


# --- as a table


@pytest.fixture
def no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pandas nor polars is installed."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", None)


def write_run(log: MetricLog) -> None:
    common = {"epoch": 0, "micro_step": 4, "time": 5.5}
    log.write({"kind": "step", "step": 1, "items": 8, **common, "metrics": {"train/loss": 0.5}})
    log.write({"kind": "skip", "step": 1, **common, "loss": math.nan})
    log.write({"kind": "evaluation", "step": 1, **common, "metrics": {"val/loss": 0.25}})
    log.write({"kind": "end", "status": "completed"})


@pytest.mark.usefixtures("no_frames")
def test_read_metrics_has_one_row_per_record_with_metrics_and_a_column_each(log: MetricLog) -> None:
    write_run(log)
    table = read_metrics(log.path.parent)
    axes = ["kind", "step", "epoch", "micro_step", "items", "time"]
    assert list(table) == [*axes, "train/loss", "val/loss"]
    assert table["kind"].tolist() == ["step", "evaluation"]
    assert table["step"].dtype.kind == "i"
    for name, values in {"items": [8, math.nan], "train/loss": [0.5, math.nan]}.items():
        assert table[name].dtype == float
        np.testing.assert_equal(table[name], np.array(values))


@pytest.mark.usefixtures("no_frames")
def test_read_metrics_of_a_run_that_has_not_begun_is_empty(log: MetricLog) -> None:
    table = read_metrics(log.path)
    assert {name: len(column) for name, column in table.items()} == dict.fromkeys(
        ["kind", "step", "epoch", "micro_step", "items", "time"], 0
    )


def test_read_metrics_returns_a_frame_of_what_is_installed(
    log: MetricLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = types.ModuleType("pandas")
    planted.DataFrame = lambda columns: ("frame", sorted(columns))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", planted)
    write_run(log)
    kind, columns = read_metrics(log.path)
    assert kind == "frame"
    assert "val/loss" in columns


def test_read_metrics_fills_a_pandas_frame(log: MetricLog) -> None:
    pandas = pytest.importorskip("pandas")
    write_run(log)
    frame = read_metrics(log.path)
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[frame["kind"] == "step", "train/loss"].tolist() == [0.5]
