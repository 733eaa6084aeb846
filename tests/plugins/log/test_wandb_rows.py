from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dovetail.types import RunInfo
from dovetail_plugins.log.wandb import Options, WandbTracker, dovetail_log
from dovetail_plugins.log.wandb_file import find_wandb_files, read_history, read_records
from dovetail_plugins.log.wandb_rows import identity, read_known, wait_until_written

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("wandb_home")


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    # W&B's process, one for all tests, would take a run that a failed test left open for this one.
    return RunInfo("digits", f"run-{secrets.token_hex(4)}", tmp_path, {})


def follow(run: RunInfo, **options: Any) -> WandbTracker:
    return dovetail_log(run, Options(mode="offline", **options))


def rows_of(run: RunInfo) -> list[dict[str, Any]]:
    files = find_wandb_files(run.directory / "wandb")
    wait_until_written(files, timeout_s=60)
    return [dict(row.values) for file in files for row in read_history(file)]


def log_steps(tracker: WandbTracker, steps: range) -> None:
    for step in steps:
        tracker.log({"loss": step / 7, "odd": math.nan, "zero": -0.0, "one": 1.0}, step)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of many blocks, with records that lie across their borders and one of several."""
    run = RunInfo("digits", "long", tmp_path_factory.mktemp("long"), {})
    tracker = follow(run)
    for step in range(400):
        tracker.log({f"m{i}": step / 7 + i for i in range(step % 9 + 1)}, step)
    tracker.log_params({"text": "x" * 200_000})
    tracker.close("completed")
    assert len(rows_of(run)) == 400
    (file,) = find_wandb_files(run.directory / "wandb")
    return file


def test_reader_finds_what_wandbs_own_reader_finds(long_file: Path) -> None:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(long_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "No such command" in done.stderr:
        pytest.skip("this release of wandb cannot inspect files")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [record.WhichOneof("record_type") for record in read_records(long_file)]
    assert kinds == [record["type"] for record in told]
    rows = [record["history"]["item"] for record in told if record["type"] == "history"]
    assert [dict(row.values) for row in read_history(long_file)] == rows
    assert len(rows) == 400
    assert max(map(len, done.stdout.splitlines())) > 200_000


def test_reader_takes_a_torn_file_up_to_where_it_is_whole(long_file: Path, tmp_path: Path) -> None:
    data, torn = long_file.read_bytes(), tmp_path / "torn.wandb"
    whole = [row.number for row in read_history(long_file)]
    numbers: list[int] = []
    for size in [*range(40), 100, 2**15 - 3, 2**15, 2**15 + 5, 2**16 + 1000, len(data) - 1]:
        torn.write_bytes(data[:size])
        before, numbers = numbers, [row.number for row in read_history(torn)]
        assert numbers == whole[: len(numbers)]
        assert len(before) <= len(numbers)
    assert len(numbers) == 400


def test_reader_passes_over_what_is_damaged(long_file: Path, tmp_path: Path) -> None:
    data, damaged = bytearray(long_file.read_bytes()), tmp_path / "damaged.wandb"
    data[2**15 : 2**15 + 2000] = bytes(2000)  # a lost page: that block cannot be followed
    data[2**16 + 200 : 2**16 + 260] = b"\xff" * 60
    damaged.write_bytes(bytes(data) + bytes(5000))
    numbers = [row.number for row in read_history(damaged)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] == 399
    assert 200 < len(numbers) < 400


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"a": 1.0, "b": math.nan}, {"b": math.nan, "a": 1}, True),
        ({"a": -0.0}, {"a": 0}, True),
        ({"a": 1.0, "_step": 4, "_runtime": 1.5, "_timestamp": 3.0}, {"a": 1.0}, True),
        ({"a": math.inf}, {"a": -math.inf}, False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, False),
        ({"a": 1.0}, {"b": 1.0}, False),
        ({"a": 1.0, "_loss": 2.0}, {"a": 1.0}, False),
        (
            {"f": {"_type": "i", "sha256": "a", "path": "x"}},
            {"f": {"_type": "i", "sha256": "a"}},
            True,
        ),
        ({"f": {"_type": "i", "sha256": "a"}}, {"f": {"_type": "i", "sha256": "b"}}, False),
        ({"h": {"bins": [0, 1], "values": [2.0]}}, {"h": {"values": [2], "bins": [0.0, 1]}}, True),
        ({"h": {"bins": [0, 1], "values": [2.0]}}, {"h": {"values": [3], "bins": [0.0, 1]}}, False),
        ({"n": 10**400}, {"n": 10**400 + 1}, False),
    ],
)
def test_rows_are_the_same_by_their_values(
    one: dict[str, Any], other: dict[str, Any], is_same: bool
) -> None:
    assert (identity(one) == identity(other)) is is_same


def test_everything_that_is_given_again_stands_once(run: RunInfo, tmp_path: Path) -> None:
    picture, bundle = tmp_path / "a.png", tmp_path / "bundle"
    Image.new("RGB", (4, 3)).save(picture)
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    for attempt in range(3):
        tracker = follow(run)
        tracker.log_params({"train.lr": 0.1})
        log_steps(tracker, range(1, 9))
        tracker.log({"loss": 1.0}, 8)
        tracker.log_figure("plot", picture, 8)
        tracker.log_text("sample", "<größer>\n" * 30, 8)
        tracker.log_histogram("weights", list(range(1100)), list(range(1101)), 8)
        tracker.log_artifact("bundle", bundle)
        log_steps(tracker, range(9, 11 + attempt))
        tracker.close("interrupted")
        rows = rows_of(run)
        assert [row["optimizer_step"] for row in rows] == [
            *range(1, 9),
            8,
            8,
            8,
            8,
            *range(9, 11 + attempt),
        ]
        assert [row["_step"] for row in rows] == list(range(len(rows)))
    texts = [row["sample"] for row in rows if "sample" in row]
    (page,) = tmp_path.glob(f"wandb/*/files/{texts[0]['path']}")
    assert "&lt;größer&gt;\n" in page.read_text(encoding="utf-8")
    (drawn,) = [row["weights"] for row in rows if "weights" in row]
    assert (len(drawn["values"]), sum(drawn["values"])) == (367, sum(range(1100)))
    assert (len(drawn["bins"]), drawn["bins"][0], drawn["bins"][-1]) == (368, 0, 1100)
    files = find_wandb_files(tmp_path / "wandb")
    kinds = Counter(r.WhichOneof("record_type") for file in files for r in read_records(file))
    assert kinds["artifact"] == 1


def test_row_with_another_value_is_added_and_comes_last(run: RunInfo) -> None:
    first = follow(run)
    log_steps(first, range(1, 6))
    first.close("interrupted")
    again = follow(run)
    log_steps(again, range(1, 4))
    again.log({"loss": 99.0}, 4)
    log_steps(again, range(5, 7))
    again.close("completed")
    losses = [(row["optimizer_step"], row["loss"]) for row in rows_of(run)]
    assert losses == [*((step, step / 7) for step in range(1, 6)), (4, 99.0), (6, 6 / 7)]


def test_row_that_was_logged_twice_is_known_twice(run: RunInfo) -> None:
    for num in (2, 3):
        tracker = follow(run)
        for _ in range(num):
            tracker.log({"loss": 1.0}, 1)
        tracker.close("interrupted")
    assert len(rows_of(run)) == 3


def test_rows_of_a_killed_process_are_known(run: RunInfo) -> None:
    code = f"""
import os, signal
from pathlib import Path
from dovetail.types import RunInfo
from dovetail_plugins.log.wandb import Options, dovetail_log
run = RunInfo("digits", {run.id!r}, Path({str(run.directory)!r}), {{}})
tracker = dovetail_log(run, Options(mode="offline"))
for step in range(600):
    tracker.log({{f"m{{i}}": step / 7 + i for i in range(8)}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = find_wandb_files(run.directory / "wandb")
    wait_until_written([left], timeout_s=60)
    # How many rows have arrived is a matter of luck; some have not.
    os.truncate(left, left.stat().st_size * 2 // 3)
    assert len(list(read_history(left))) < 600
    tracker = follow(run)
    for step in range(600):
        tracker.log({f"m{i}": step / 7 + i for i in range(8)}, step)
    tracker.close("completed")
    rows = rows_of(run)
    assert [row["optimizer_step"] for row in rows] == list(range(600))
    assert [row["_step"] for row in rows] == list(range(600))


@pytest.fixture
def twenty_rows(run: RunInfo) -> list[Path]:
    """The file of a process that has handed over twenty rows, 0 to 19."""
    tracker = follow(run)
    log_steps(tracker, range(20))
    tracker.close("completed")
    rows_of(run)
    return find_wandb_files(run.directory / "wandb")


def unended(file: Path) -> list[Path]:
    """Cut off the end of a file, as a kill does; the rows stay."""
    exits = [r for r in read_records(file) if r.WhichOneof("record_type") == "exit"]
    file.write_bytes(file.read_bytes()[: -len(exits[0].SerializeToString()) - 7])
    return [file]


def test_online_only_rows_that_the_server_has_are_known(twenty_rows: list[Path]) -> None:
    known = read_known(twenty_rows, starting_step=12)
    assert (known.next_number, known.num_unseen, known.rows.total()) == (12, 0, 12)
    offline = read_known(twenty_rows)
    assert (offline.next_number, offline.num_unseen, offline.rows.total()) == (20, 0, 20)


def test_online_rows_that_only_the_server_has_are_those_that_come_next(
    twenty_rows: list[Path],
) -> None:
    known = read_known(unended(twenty_rows[0]), starting_step=23)
    assert (known.next_number, known.num_unseen, known.rows.total()) == (23, 3, 20)
    row = {"loss": 0.5, "optimizer_step": 20}
    assert [known.take(row) for _ in range(4)] == [True, True, True, False]


def test_online_rows_of_somebody_else_are_none_of_ours(twenty_rows: list[Path]) -> None:
    assert read_known(twenty_rows, starting_step=23).num_unseen == 0
    assert read_known([], starting_step=500).num_unseen == 0


def test_online_a_later_process_tells_what_the_server_lacked(
    run: RunInfo, twenty_rows: list[Path], tmp_path: Path
) -> None:
    """The second process went on from 12, because the server had lost the rest."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "wandb", other / "wandb")
    second = follow(RunInfo("digits", run.id, other, {}))
    second._known.next_number = 12
    second._known.rows.clear()
    log_steps(second, range(12, 15))
    second.close("completed")
    rows_of(RunInfo("digits", run.id, other, {}))
    files = find_wandb_files(other / "wandb")
    known = read_known(files, starting_step=15)
    assert known.rows.total() == 15
    assert set(known.rows.values()) == {1}
