from __future__ import annotations

import json
from typing import Any

import pytest

from dovetail.run.tracking import MetricLog
from dovetail.run.tracking.calls import MAX_ROWS, CallReader, TrackerCall

EVERYTHING = ("params", "figures", "texts", "histograms", "artifacts")

FILES = [
    {"kind": "figure", "step": 1, "name": "confusion", "file": "media/confusion.png"},
    {"kind": "text", "step": 2, "name": "sample", "file": "media/sample.txt"},
    {"kind": "histogram", "step": 3, "name": "weights", "file": "media/weights.json"},
    {"kind": "artifact", "time": 0.0, "name": "bundle", "file": "bundle"},
]


def step_record(step: int) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": {"train/loss": float(step)}}


def make_calls(log: MetricLog, tracker: Any, offset: int = 0) -> list[TrackerCall]:
    """Make the calls of a log, all of them."""
    calls = list(CallReader(log.path, tracker).read(offset))
    for call in calls:
        if call.act is not None:
            call.act()
    return calls


class Batching:
    """A tracker that takes several rows at once."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def log_many(self, rows: Any) -> None:
        self.batches.append([step for step, _ in rows])

    def log_params(self, params: Any) -> None:
        self.batches.append([])


def test_each_kind_of_record_becomes_its_call(log: MetricLog, recorder: Any) -> None:
    folder = log.path.parent
    (folder / "media").mkdir()
    (folder / "media/sample.txt").write_text("größer\n", encoding="utf-8")
    drawn = {"counts": [1, 2], "edges": [0.0, 0.5, 1.0]}
    (folder / "media/weights.json").write_text(json.dumps(drawn), encoding="utf-8")
    tracker = recorder(capabilities=EVERYTHING)
    records = [
        {"kind": "params", "params": {"a.b": 1}},
        step_record(4),
        {"kind": "evaluation", "step": 4, "metrics": {"val/loss": 0.5}},
        {"kind": "system", "step": 3, "metrics": {"system/cpu_percent": 9.0}},
        *FILES,
    ]
    for record in records:
        log.write(record)
    calls = make_calls(log, tracker)
    assert tracker.calls == [
        ("log_params", {"a.b": 1}),
        ("log", 4, {"train/loss": 4.0}),
        ("log", 4, {"val/loss": 0.5}),
        ("log", 3, {"system/cpu_percent": 9.0}),
        ("log_figure", "confusion", folder / "media/confusion.png", 1),
        ("log_text", "sample", "größer\n", 2),
        ("log_histogram", "weights", [1, 2], [0.0, 0.5, 1.0], 3),
        ("log_artifact", "bundle", folder / "bundle"),
    ]
    assert [call.file for call in calls] == [""] * 4 + [str(record["file"]) for record in FILES]


def test_files_go_to_those_who_hold_them_and_settings_to_all(log: MetricLog, recorder: Any) -> None:
    log.write({"kind": "params", "params": {}})
    for record in FILES:
        log.write(record)
    tracker = recorder(capabilities=["figures", "artifacts"])
    calls = make_calls(log, tracker)
    assert tracker.methods == ["log_params", "log_figure", "log_artifact"]
    assert [call.act is None for call in calls] == [False, False, True, True, False]


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "end", "status": "completed"},
        {"kind": "skip", "step": 3, "loss": "NaN"},
        {"kind": "step", "step": 3},
        {"kind": "step", "step": 3, "metrics": {}},
        {"kind": "step", "metrics": {"a": 1.0}},
        {"kind": "step", "step": "3", "metrics": {"a": 1.0}},
        {"kind": "video", "step": 3, "name": "clip", "file": "clip.mp4"},
        {"kind": "params"},
        {"kind": "figure", "step": 3, "name": "confusion"},
        {"kind": "artifact", "file": "bundle"},
        {},
    ],
)
def test_a_record_that_nobody_can_take_is_no_call(
    log: MetricLog, recorder: Any, record: dict[str, Any]
) -> None:
    log.write(record)
    log.write(step_record(1))
    tracker = recorder(capabilities=EVERYTHING)
    nothing, call = make_calls(log, tracker)
    assert nothing.act is None
    assert call.end == log.tell()
    assert tracker.calls == [("log", 1, {"train/loss": 1.0})]


def test_calls_end_where_their_records_do(log: MetricLog, recorder: Any) -> None:
    ends = []
    for step in range(4):
        log.write(step_record(step))
        ends.append(log.tell())
    tracker = recorder()
    assert [call.end for call in make_calls(log, tracker)] == ends
    make_calls(log, tracker, ends[2])
    assert tracker.steps == [0, 1, 2, 3, 3]
    assert make_calls(log, tracker, ends[3]) == []


def test_a_record_that_is_being_written_is_left_for_later(log: MetricLog, recorder: Any) -> None:
    log.write(step_record(1))
    whole = log.tell()
    line = json.dumps(step_record(2)).encode()
    tracker = recorder()
    with log.path.open("ab", buffering=0) as file:
        file.write(line)
        (call,) = make_calls(log, tracker)
        assert call.end == whole
        file.write(b"\n")
    make_calls(log, tracker, whole)
    assert tracker.steps == [1, 2]


def test_a_damaged_line_is_no_call(log: MetricLog, recorder: Any) -> None:
    log.write(step_record(0))
    with log.path.open("ab") as file:
        file.write(b"\x00\x00\xff\n[1, 2]\n")
    log.write(step_record(1))
    tracker = recorder()
    calls = make_calls(log, tracker)
    assert tracker.steps == [0, 1]
    assert [call.act is None for call in calls] == [False, True, True, False]


def test_rows_come_together_for_a_tracker_that_takes_several(log: MetricLog) -> None:
    num_rows = 2 * MAX_ROWS + 3
    for step in range(num_rows):
        log.write(step_record(step))
    tracker = Batching()
    calls = make_calls(log, tracker)
    assert [len(batch) for batch in tracker.batches] == [MAX_ROWS, MAX_ROWS, 3]
    assert [step for batch in tracker.batches for step in batch] == list(range(num_rows))
    lines = log.path.read_bytes().splitlines(keepends=True)
    ends = [sum(map(len, lines[:n])) for n in (MAX_ROWS, 2 * MAX_ROWS, num_rows)]
    assert [call.end for call in calls] == ends


def test_rows_that_come_together_keep_their_place_among_the_others(log: MetricLog) -> None:
    for step in (0, 1):
        log.write(step_record(step))
    log.write({"kind": "params", "params": {}})
    log.write(step_record(2))
    tracker = Batching()
    calls = make_calls(log, tracker)
    assert tracker.batches == [[0, 1], [], [2]]
    assert calls[-1].end == log.tell()
    # Each batch can be made again, as after an error.
    assert calls[0].act is not None
    calls[0].act()
    assert tracker.batches[-1] == [0, 1]
