from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dovetail import MetricsTracker
from dovetail.errors import ConfigError, MissingDependencyError
from dovetail.run.tracking import LOG_NAME, read_records

NAMES = ("train/loss", "train/accuracy", "grad_norm")


def value_of(name: str, step: int) -> float:
    """Return a value that no other name and step have."""
    return (NAMES.index(name) + 1) * 10_000.0 + step * 0.5


def mean_of(name: str, steps: range) -> float:
    return sum(value_of(name, step) for step in steps) / len(steps)


def log_steps(tracker: MetricsTracker, num_steps: int) -> None:
    for step in range(num_steps):
        for name in NAMES:
            tracker.log_scalar(name, value_of(name, step), step=step)


def steps_in(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(directory) if record["kind"] == "step"]


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[MetricsTracker]:
    with MetricsTracker(directory=tmp_path, gradient_accumulation_steps=4) as made:
        yield made


# --- records


@pytest.mark.parametrize(
    ("num_steps", "accumulation_steps", "expected"),
    [(1000, 1, 1000), (1000, 2, 500), (1000, 4, 250), (1000, 8, 125), (1003, 4, 251), (0, 4, 0)],
)
def test_each_optimizer_step_is_one_record_with_the_means_of_all_metrics(
    tmp_path: Path, num_steps: int, accumulation_steps: int, expected: int
) -> None:
    with MetricsTracker(False, accumulation_steps, directory=tmp_path) as tracker:
        log_steps(tracker, num_steps)
    records = steps_in(tmp_path) if num_steps else []
    assert [record["step"] for record in records] == list(range(expected))
    for number, record in enumerate(records):
        start = number * accumulation_steps
        steps = range(start, min(start + accumulation_steps, num_steps))
        assert record["micro_step"] == steps.stop
        assert record["metrics"] == {name: mean_of(name, steps) for name in NAMES}


def test_a_step_is_written_as_soon_as_the_next_one_begins(
    tracker: MetricsTracker, tmp_path: Path
) -> None:
    log_steps(tracker, 8)
    assert [record["step"] for record in steps_in(tmp_path)] == [0]
    tracker.log_scalar("train/loss", 1.0, step=8)
    assert [record["step"] for record in steps_in(tmp_path)] == [0, 1]


def test_flush_writes_the_open_step_once(tracker: MetricsTracker, tmp_path: Path) -> None:
    log_steps(tracker, 6)
    tracker.flush()
    tracker.flush()
    tracker.close()
    assert [record["step"] for record in steps_in(tmp_path)] == [0, 1]


def test_the_log_begins_with_the_settings_and_ends_with_how_it_went(tmp_path: Path) -> None:
    with MetricsTracker(gradient_accumulation_steps=4, directory=tmp_path) as tracker:
        log_steps(tracker, 4)
    first, *_, last = read_records(tmp_path)
    assert (first["kind"], first["params"]) == ("params", {"gradient_accumulation_steps": 4})
    assert (last["kind"], last["status"]) == ("end", "completed")


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_loop_that_fails_has_its_open_step_written(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    def fail() -> None:
        with MetricsTracker(directory=tmp_path) as tracker:
            tracker.log_scalar("loss", 1.0)
            raise error

    with pytest.raises(error):
        fail()
    *_, step, end = read_records(tmp_path)
    assert step["metrics"] == {"loss": 1.0}
    assert end["status"] == status


def test_without_a_step_each_name_counts_its_own_values(
    tracker: MetricsTracker, tmp_path: Path
) -> None:
    for step in range(8):
        for name in NAMES:
            tracker.log_scalar(name, value_of(name, step))
    tracker.close()
    found = [record["metrics"] for record in steps_in(tmp_path)]
    expected = [{n: mean_of(n, range(s, s + 4)) for n in NAMES} for s in (0, 4)]
    assert found == expected


def test_a_count_goes_on_from_a_step_that_was_given(
    tracker: MetricsTracker, tmp_path: Path
) -> None:
    tracker.log_scalar("loss", 1.0, step=40)
    tracker.log_scalar("loss", 3.0)
    tracker.close()
    (record,) = steps_in(tmp_path)
    assert (record["step"], record["micro_step"], record["metrics"]) == (10, 42, {"loss": 2.0})


def test_values_that_are_not_committed_are_held_and_never_dropped(tmp_path: Path) -> None:
    with MetricsTracker(directory=tmp_path) as tracker:
        tracker.log_scalar("a", 1.0, step=0)
        tracker.log_scalar("a", 2.0, step=1, commit=False)
        tracker.log_scalar("b", 3.0, step=2, commit=False)
        assert not (tmp_path / LOG_NAME).exists()
        tracker.log_scalar("c", 4.0, step=2)
        found = [(record["step"], record["metrics"]) for record in steps_in(tmp_path)]
        assert found == [(0, {"a": 1.0}), (1, {"a": 2.0})]
        tracker.log_scalar("d", 5.0, step=3, commit=False)
    found = [(record["step"], record["metrics"]) for record in steps_in(tmp_path)]
    assert found[2:] == [(2, {"b": 3.0, "c": 4.0}), (3, {"d": 5.0})]


def test_a_late_value_is_kept_as_a_record_of_its_own_step(
    tracker: MetricsTracker, tmp_path: Path
) -> None:
    log_steps(tracker, 11)
    tracker.log_scalar("late", 7.0, step=1)
    tracker.log_scalar(NAMES[0], value_of(NAMES[0], 11), step=11)
    tracker.close()
    found = [(record["step"], len(record["metrics"])) for record in steps_in(tmp_path)]
    assert found == [(0, 3), (1, 3), (0, 1), (2, 3)]
    # The step that was open is none the worse for it.
    last = steps_in(tmp_path)[-1]["metrics"]
    assert last[NAMES[0]] == mean_of(NAMES[0], range(8, 12))


@pytest.mark.parametrize("num_steps", [3, 4, 8, 11, 12])
def test_steps_that_are_counted_anew_each_epoch_are_written_in_their_order(
    tracker: MetricsTracker, tmp_path: Path, num_steps: int
) -> None:
    for _ in range(3):
        log_steps(tracker, num_steps)
    tracker.close()
    windows = [range(start, min(start + 4, num_steps)) for start in range(0, num_steps, 4)]
    found = [(record["step"], record["metrics"]) for record in steps_in(tmp_path)]
    assert found == 3 * [
        (number, {name: mean_of(name, steps) for name in NAMES})
        for number, steps in enumerate(windows)
    ]


def test_ten_threads_of_a_hundred_values_lose_none(tmp_path: Path) -> None:
    with MetricsTracker(gradient_accumulation_steps=4, directory=tmp_path) as tracker:

        def log(thread: int) -> None:
            for step in range(100):
                tracker.log_scalar(f"metric {thread}", thread * 1000.0 + step, step=step)

        threads = [threading.Thread(target=log, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = tracker._scalars.rows
    assert len(rows) == len({row.value for row in rows}) == 1000
    found: dict[str, set[int]] = {}
    for record in steps_in(tmp_path):
        for name in record["metrics"]:
            found.setdefault(name, set()).add(record["step"])
    assert found == {f"metric {n}": set(range(25)) for n in range(10)}


def test_a_tensor_is_read_when_its_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.run.tracking.values.HOST_DEVICES", frozenset())
    running = torch.zeros(())
    with MetricsTracker(gradient_accumulation_steps=4, directory=tmp_path) as tracker:
        for step in range(8):
            running += 1
            tracker.log_scalar("running", running, step=step)
    found = [record["metrics"]["running"] for record in steps_in(tmp_path)]
    assert found == [2.5, 6.5]


@pytest.mark.filterwarnings("ignore:metric 'loss' is nan for the first time")
def test_a_nan_is_kept(tmp_path: Path) -> None:
    with MetricsTracker(directory=tmp_path) as tracker:
        tracker.log_scalar("loss", math.nan)
    assert math.isnan(steps_in(tmp_path)[0]["metrics"]["loss"])


# --- the table


@pytest.fixture
def pandas() -> Any:
    return pytest.importorskip("pandas")


COLUMNS = ["step", "effective_step", "metric", "value", "timestamp"]


@pytest.mark.usefixtures("pandas")
def test_the_table_has_every_value_by_step(tracker: MetricsTracker) -> None:
    for step in (5, 0, 3):
        tracker.log_scalar("loss", np.float32(step / 2), step=step)
        tracker.log_scalar("accuracy", torch.tensor(step * 2), step=step)
    frame = tracker.get_step_metrics()
    assert list(frame.columns) == COLUMNS
    rows = list(zip(*(frame[column].tolist() for column in COLUMNS[:4]), strict=True))
    assert rows == [
        (0, 0, "loss", 0.0),
        (0, 0, "accuracy", 0.0),
        (3, 0, "loss", 1.5),
        (3, 0, "accuracy", 6.0),
        (5, 1, "loss", 2.5),
        (5, 1, "accuracy", 10.0),
    ]
    assert frame["timestamp"].between(1.5e9, 1e11).all()


@pytest.mark.usefixtures("pandas")
def test_the_table_of_nothing_has_its_columns(tracker: MetricsTracker) -> None:
    frame = tracker.get_step_metrics()
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 0


@pytest.mark.usefixtures("pandas")
def test_the_table_of_values_still_on_a_device_has_them(
    tracker: MetricsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.run.tracking.values.HOST_DEVICES", frozenset())
    tracker.log_scalar("loss", torch.tensor(0.5))
    assert tracker.get_step_metrics()["value"].tolist() == [0.5]


@pytest.mark.parametrize("method", ["get_step_metrics", "get_summary"])
def test_without_pandas_the_tables_say_what_to_install(
    tracker: MetricsTracker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=f"{method}: needs .*pip install pandas"):
        getattr(tracker, method)()


# --- what is refused


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_metric_needs_a_name(tracker: MetricsTracker, name: Any) -> None:
    with pytest.raises(ValueError, match="metric_name must be a non-empty string"):
        tracker.log_scalar(name, 1.0)


@pytest.mark.parametrize("value", ["0.5", None, [1.0], 1j])
def test_a_value_must_be_a_number(tracker: MetricsTracker, value: Any) -> None:
    with pytest.raises(ValueError, match=r"log_scalar 'loss': non-numeric value"):
        tracker.log_scalar("loss", value)


def test_a_value_of_many_elements_is_refused(tracker: MetricsTracker) -> None:
    with pytest.raises(ValueError, match=r"tensor of shape \(2, 3\).*\.mean\(\)"):
        tracker.log_scalar("loss", torch.zeros(2, 3))


@pytest.mark.parametrize("step", [-1, 1.5, "3", True])
def test_a_step_must_be_an_index(tracker: MetricsTracker, step: Any) -> None:
    with pytest.raises(ConfigError, match=r"log_scalar: step is .*; expected an integer >= 0"):
        tracker.log_scalar("loss", 1.0, step=step)


def test_a_step_may_be_numpys(tracker: MetricsTracker, tmp_path: Path) -> None:
    tracker.log_scalar("loss", 1.0, step=np.int64(9))  # type: ignore[arg-type]
    tracker.flush()
    assert steps_in(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None])
def test_accumulation_steps_must_be_a_count(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be >= 1, got"):
        MetricsTracker(gradient_accumulation_steps=steps)


def test_after_close_nothing_is_taken(tracker: MetricsTracker, tmp_path: Path) -> None:
    tracker.log_scalar("loss", 1.0)
    tracker.close()
    tracker.close()
    for log in (lambda: tracker.log_scalar("loss", 1.0), lambda: tracker.log_epoch(0, {})):
        with pytest.raises(ConfigError, match=r"MetricsTracker: is closed\. Make a new one"):
            log()
    assert len(steps_in(tmp_path)) == 1


# --- epochs


def test_an_epoch_is_a_record_with_perplexities(tracker: MetricsTracker, tmp_path: Path) -> None:
    log_steps(tracker, 6)
    tracker.log_epoch(
        0,
        {"loss": 2.0, "accuracy": torch.tensor(0.5)},
        {"loss": 700.0},
        learning_rate=1e-3,
        gradient_norm=np.float64(2.5),
        epoch_duration=9,
    )
    *_, last = read_records(tmp_path)
    assert (last["kind"], last["epoch"], last["step"]) == ("evaluation", 0, 1)
    assert last["metrics"] == {
        "train/loss": 2.0,
        "train/accuracy": 0.5,
        "train/perplexity": math.exp(2.0),
        "val/loss": 700.0,
        "val/perplexity": math.exp(100.0),
        "learning_rate": 1e-3,
        "gradient_norm": 2.5,
        "epoch_duration": 9.0,
    }
    # The tail of the epoch is written before it.
    assert [record["step"] for record in steps_in(tmp_path)] == [0, 1]


def test_without_validation_data_nothing_is_made_up(
    tracker: MetricsTracker, tmp_path: Path
) -> None:
    tracker.log_epoch(0, {"accuracy": 0.5})
    *_, last = read_records(tmp_path)
    assert last["metrics"] == {"train/accuracy": 0.5}


def test_a_perplexity_of_the_callers_own_is_kept(tracker: MetricsTracker, tmp_path: Path) -> None:
    tracker.log_epoch(0, {"loss": 1.0, "perplexity": 7.0})
    *_, last = read_records(tmp_path)
    assert last["metrics"] == {"train/loss": 1.0, "train/perplexity": 7.0}


@pytest.mark.usefixtures("pandas")
def test_the_summary_has_one_row_per_epoch(tracker: MetricsTracker) -> None:
    tracker.log_epoch(0, {"accuracy": 0.25})
    tracker.log_epoch(1, {"accuracy": 0.5}, {"accuracy": 0.75})
    frame = tracker.get_summary()
    assert list(frame.columns) == ["epoch", "train/accuracy", "val/accuracy"]
    assert frame["train/accuracy"].tolist() == [0.25, 0.5]
    assert math.isnan(frame["val/accuracy"][0])
    assert frame["epoch"].tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:metric .* is nan for the first time")
def test_the_best_epoch_is_that_of_the_smallest_or_largest_value(tracker: MetricsTracker) -> None:
    for epoch, loss in enumerate([math.nan, 0.5, 0.2, 0.2, 0.9]):
        tracker.log_epoch(10 + epoch, {"loss": 1.0}, {"loss": loss})
    assert tracker.get_best_epoch() == 12
    assert tracker.get_best_epoch("val/loss", "max") == 14
    assert tracker.get_best_epoch("train/loss") == 10


def test_the_best_epoch_of_nothing_is_an_error(tracker: MetricsTracker) -> None:
    with pytest.raises(ConfigError, match="no epoch has a value of 'val/loss'; expected log_epoch"):
        tracker.get_best_epoch()
    tracker.log_epoch(0, {}, {"accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"expected one of val/accuracy. Did you mean"):
        tracker.get_best_epoch("val/acuracy")
    with pytest.raises(ConfigError, match="mode is 'best'; expected 'min' or 'max'"):
        tracker.get_best_epoch("val/accuracy", "best")


@pytest.mark.parametrize("epoch", ["1", 1.5, None])
def test_an_epoch_must_be_a_number(tracker: MetricsTracker, epoch: Any) -> None:
    with pytest.raises(ConfigError, match="log_epoch: epoch is"):
        tracker.log_epoch(epoch, {})


# --- an accumulator that counts


def accumulator_of(steps: int) -> tuple[Any, nn.Module]:
    exact = pytest.importorskip("dovetail_plugins.accumulate.exact")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return exact.GradientAccumulator(optimizer, accumulation_steps=steps), model


@pytest.mark.parametrize("is_before", [True, False])
def test_with_an_accumulator_the_records_are_its_steps_tails_and_all(
    tmp_path: Path, is_before: bool
) -> None:
    accumulator, model = accumulator_of(4)
    windows = [range(4), range(4, 8), range(8, 10), range(10, 14), range(14, 18), range(18, 20)]
    counts = []
    # Four by the argument's count would be 0, 4, 8, 12 and 16.
    with MetricsTracker(gradient_accumulation_steps=4, directory=tmp_path) as tracker:
        tracker.attach(accumulator)
        for step in range(20):
            loss = model(torch.ones(1, 1)).mean()
            if is_before:
                counts.append(accumulator.effective_step)
                log_one(tracker, step)
            accumulator.accumulate(loss, model, is_final_batch=step % 10 == 9)
            if not is_before:
                counts.append(accumulator.effective_step)
                log_one(tracker, step)
        rows = tracker._scalars.rows
    assert [row.effective_step for row in rows if row.metric == NAMES[0]] == counts
    records = steps_in(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    for record, steps in zip(records, windows, strict=True):
        assert record["metrics"] == {name: mean_of(name, steps) for name in NAMES}


def log_one(tracker: MetricsTracker, step: int) -> None:
    for name in NAMES:
        tracker.log_scalar(name, value_of(name, step))


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.filterwarnings("ignore:.*not finite")
def test_a_step_that_the_accumulator_skips_counts_nowhere(tmp_path: Path, is_before: bool) -> None:
    accumulator, model = accumulator_of(2)
    with MetricsTracker(directory=tmp_path) as tracker:
        tracker.attach(accumulator)
        for step in range(6):
            loss = model(torch.ones(1, 1)).mean()
            if is_before:
                log_one(tracker, step)
            accumulator.accumulate(loss * (math.nan if step == 3 else 1), model)
            if not is_before:
                log_one(tracker, step)
    assert accumulator.effective_step == 2
    records = steps_in(tmp_path)
    assert [record["step"] for record in records] == [0, 1]
    for record, steps in zip(records, [range(2), range(4, 6)], strict=True):
        assert record["metrics"] == {name: mean_of(name, steps) for name in NAMES}


# --- processes


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with MetricsTracker(use_wandb=True, directory=tmp_path / "run") as tracker:
        log_steps(tracker, 3)
        tracker.log_epoch(3, {"loss": 1.0})
        assert tracker.get_best_epoch("train/loss") == 3
    assert not (tmp_path / "run").exists()


def test_a_rank_stays_one_after_its_group_has_ended(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tracker = MetricsTracker(directory=tmp_path / "run")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        tracker.log_scalar("loss", 1.0)
    finally:
        dist.destroy_process_group()
    tracker.close()
    assert not (tmp_path / "run").exists()


SCRIPT = """
import os, sys
from dovetail import MetricsTracker
tracker = MetricsTracker(use_wandb=sys.argv[2] == "wandb", gradient_accumulation_steps=4,
                         directory=sys.argv[1])
for step in range(6):
    tracker.log_scalar("loss", float(step), step=step)
if sys.argv[2] == "alone" and hasattr(os, "fork"):  # a copy of the process must not write too
    if os.fork() == 0:
        sys.exit()
    os.wait()
"""


def run_script(tmp_path: Path, *arguments: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_the_end_of_the_process_writes_the_open_step(tmp_path: Path) -> None:
    run_script(tmp_path, str(tmp_path / "run"), "alone")
    found = [(record["step"], record["metrics"]) for record in steps_in(tmp_path / "run")]
    assert found == [(0, {"loss": 1.5}), (1, {"loss": 4.5})]
    *_, end = read_records(tmp_path / "run")
    assert end["status"] == "completed"


def test_a_tracker_without_a_folder_gets_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    MetricsTracker().close()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        with MetricsTracker() as tracker:
            tracker.log_scalar("loss", 1.0)
    folders = list((tmp_path / "runs/metrics").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert len(steps_in(folder)) == 1


# --- W&B


@pytest.fixture
def offline(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Return the rows that W&B has committed, once it has written the end of the run."""
    from dovetail_plugins.log.wandb_file import find_wandb_files, read_history
    from dovetail_plugins.log.wandb_rows import wait_until_written

    (file,) = find_wandb_files(directory / "wandb")
    wait_until_written([file], timeout_s=60)
    return [dict(row.values) for row in read_history(file)]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("num_steps", "accumulation_steps", "expected"),
    [(1000, 1, 1000), (1000, 2, 500), (1000, 4, 250), (1000, 8, 125), (1003, 4, 251)],
)
def test_wandb_has_one_row_per_optimizer_step_with_the_means_of_all_metrics(
    tmp_path: Path, num_steps: int, accumulation_steps: int, expected: int
) -> None:
    with MetricsTracker(True, accumulation_steps, directory=tmp_path) as tracker:
        log_steps(tracker, num_steps)
    rows = rows_of(tmp_path)
    assert [row["optimizer_step"] for row in rows] == list(range(expected))
    for number, row in enumerate(rows):
        start = number * accumulation_steps
        steps = range(start, min(start + accumulation_steps, num_steps))
        assert {name: row[name] for name in NAMES} == {n: mean_of(n, steps) for n in NAMES}


@pytest.mark.usefixtures("offline")
def test_wandb_has_every_epoch_too(tmp_path: Path) -> None:
    with MetricsTracker(True, 4, directory=tmp_path) as tracker:
        for epoch in range(3):
            log_steps(tracker, 6)
            tracker.log_epoch(epoch, {"loss": 1.0 + epoch})
    rows = rows_of(tmp_path)
    assert [row["train/perplexity"] for row in rows if "train/perplexity" in row] == [
        math.exp(1.0 + epoch) for epoch in range(3)
    ]
    assert len(rows) == 3 * (2 + 1)


@pytest.mark.usefixtures("offline")
def test_wandb_has_the_open_step_at_the_end_of_the_process(tmp_path: Path) -> None:
    run_script(tmp_path, str(tmp_path / "run"), "wandb")
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [1.5, 4.5]


def test_without_wandb_the_tracker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module that is not there, for the process of the trackers too.
    (tmp_path / "wandb.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    directory = tmp_path / "run"
    with pytest.raises(MissingDependencyError, match=r"pip install .dovetail\[wandb\]"):
        MetricsTracker(use_wandb=True, directory=directory)
    assert not directory.exists()
    with MetricsTracker(directory=directory) as tracker:
        tracker.log_scalar("loss", 1.0)
    assert json.loads((directory / LOG_NAME).read_text().splitlines()[1])["step"] == 0
