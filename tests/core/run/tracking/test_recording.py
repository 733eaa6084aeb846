from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail.run.tracking import MetricLog, read_records
from dovetail.run.tracking.recording import (
    Recorder,
    log_artifact,
    log_figure,
    log_histogram,
    log_metric,
    log_text,
    muted,
    rehearsal,
)

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")

PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"


class Position:
    """Where a run stands."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> dict[str, int]:
        return {"step": self.step, "epoch": 0, "micro_step": 4 * self.step}


@pytest.fixture
def position() -> Position:
    return Position()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricLog]:
    folder = tmp_path / "run"
    folder.mkdir()
    made = MetricLog(folder)
    yield made
    made.close()


@pytest.fixture
def recorder(log: MetricLog, position: Position) -> Iterator[Recorder]:
    """A run that is under way, in a training micro-batch."""
    with Recorder(log, position) as made:
        made.phase = made.train
        yield made


def records_of(log: MetricLog) -> list[dict[str, Any]]:
    return list(read_records(log.path))


def finish_window(recorder: Recorder, items: float = 1) -> dict[str, float]:
    recorder.train.fold(items)
    return recorder.train.close()


# --- outside of a run


def log_everything() -> None:
    log_metric("m", 1.0)
    log_figure("figure", "no such file")
    log_text("text", "text")
    log_histogram("histogram", [1.0])
    log_artifact("artifact", "no such file")


def test_outside_of_a_run_everything_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log_everything()
    log_metric("", "nonsense")
    assert list(tmp_path.iterdir()) == []


def test_after_a_run_everything_does_nothing_again(log: MetricLog, position: Position) -> None:
    with Recorder(log, position) as recorder:
        recorder.phase = recorder.train
    log_everything()
    assert not recorder.train.pending
    assert records_of(log) == []


def test_after_a_run_that_failed_everything_does_nothing_again(
    log: MetricLog, position: Position
) -> None:
    with pytest.raises(RuntimeError, match="planted"), Recorder(log, position):
        raise RuntimeError("planted")
    log_everything()
    assert records_of(log) == []


def test_a_run_within_a_run_has_its_own_metrics(
    recorder: Recorder, tmp_path: Path, position: Position
) -> None:
    inner_dir = tmp_path / "inner"
    inner_dir.mkdir()
    inner_log = MetricLog(inner_dir)
    log_metric("outer", 1.0)
    with Recorder(inner_log, position) as inner:
        inner.phase = inner.train
        log_metric("inner", 2.0)
        assert finish_window(inner) == {"train/inner": 2.0}
    inner_log.close()
    log_metric("outer", 3.0)
    assert finish_window(recorder) == {"train/outer": 2.0}


def test_two_runs_at_once_in_two_threads_do_not_mix(
    recorder: Recorder, tmp_path: Path, position: Position
) -> None:
    found: dict[str, Any] = {}
    is_open, is_done = threading.Event(), threading.Event()

    def run_another() -> None:
        folder = tmp_path / "other"
        folder.mkdir()
        other_log = MetricLog(folder)
        with Recorder(other_log, position) as other:
            other.phase = other.train
            is_open.set()
            is_done.wait(10)
            log_metric("theirs", 2.0)
            found["theirs"] = finish_window(other)
        other_log.close()

    def log_from_nowhere() -> None:
        log_metric("whose", 3.0)

    thread = threading.Thread(target=run_another)
    thread.start()
    is_open.wait(10)
    log_metric("ours", 1.0)
    third = threading.Thread(target=log_from_nowhere)
    third.start()
    third.join()
    is_done.set()
    thread.join()
    assert finish_window(recorder) == {"train/ours": 1.0}
    assert found["theirs"] == {"train/theirs": 2.0}


def test_a_thread_of_the_run_logs_for_it(recorder: Recorder) -> None:
    thread = threading.Thread(target=log_metric, args=("m", 1.0))
    thread.start()
    thread.join()
    assert finish_window(recorder) == {"train/m": 1.0}


def test_a_backward_hook_logs_for_the_run(recorder: Recorder) -> None:
    value = torch.tensor(3.0, requires_grad=True)
    value.register_hook(lambda gradient: log_metric("gradient", gradient))
    (value * 4).backward()  # type: ignore[no-untyped-call]
    assert finish_window(recorder) == {"train/gradient": 4.0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers of a loader are not forked here")
def test_a_forked_worker_logs_nothing_of_its_parents_run(
    recorder: Recorder, log: MetricLog
) -> None:
    with warnings.catch_warnings():
        # Python warns of forks from processes with threads, which torch has.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            recorder.phase = None
            log_metric("m", 1.0)
            log_text("text", "of a child")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert records_of(log) == []
    assert not (log.path.parent / "media").exists()


def test_nothing_is_logged_while_muted(recorder: Recorder, log: MetricLog) -> None:
    with muted():
        log_everything()
    assert finish_window(recorder) == {}
    assert records_of(log) == []


def test_a_rehearsal_learns_the_names_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with rehearsal() as trial:
        log_metric("f1", torch.tensor(0.5))
        log_metric("own/metric", 1.0)
        log_text("text", "text")
    assert trial.names == ["val/f1", "own/metric"]
    trial.reserve(["accuracy"])
    with pytest.raises(ConfigError, match="'val/f1': the run logs a metric of this name itself"):
        trial.reserve(["f1"])
    assert list(tmp_path.iterdir()) == []


# --- metrics


def test_metrics_get_the_prefix_of_their_phase(recorder: Recorder) -> None:
    log_metric("m", 1.0)
    with recorder.evaluating() as windows:
        log_metric("m", 2.0)
        recorder.fold_evaluation(["loss"], 3)
        log_metric("m", 5.0)
        recorder.fold_evaluation(["loss"], torch.tensor(1))
        assert windows.close() == {"val/m": (2 * 3 + 5 * 1) / 4}
    assert finish_window(recorder) == {"train/m": 1.0}


def test_an_evaluation_that_was_stopped_leaves_nothing_for_the_next(recorder: Recorder) -> None:
    with recorder.evaluating():
        log_metric("m", 2.0)
        recorder.fold_evaluation(["loss"], 3)
        log_metric("m", 2.0)
    with recorder.evaluating() as windows:
        assert windows.close() == {}


@pytest.mark.parametrize(
    "name", ["loss", "lr", "grad_norm", "train/loss", "train/items", "val/loss"]
)
def test_the_runs_own_metrics_cannot_be_logged(recorder: Recorder, name: str) -> None:
    with pytest.raises(ConfigError, match="the run logs a metric of this name itself"):
        log_metric(name, 1.0)


def test_the_metrics_of_the_objective_cannot_be_logged(recorder: Recorder) -> None:
    with recorder.evaluating():
        log_metric("accuracy", 1.0)
        with pytest.raises(ConfigError, match="'val/accuracy': the run logs"):
            recorder.fold_evaluation(["loss", "accuracy"], 3)


def test_an_observer_cannot_log_the_metrics_of_the_objective_either(recorder: Recorder) -> None:
    with recorder.evaluating():
        recorder.fold_evaluation(["loss", "perplexity"], 3)
    with pytest.raises(ConfigError, match="'val/perplexity': the run logs"):
        log_metric("val/perplexity", 1.0)


def test_between_two_steps_a_metric_is_recorded_at_once(
    recorder: Recorder, log: MetricLog, position: Position
) -> None:
    recorder.phase, position.step = None, 7
    log_metric("from an observer", torch.tensor(0.5))
    log_metric("top", 3, reduce="max", across_ranks=True)
    first, second = records_of(log)
    assert first.pop("time") <= second.pop("time")
    axes = {"kind": "values", "step": 7, "epoch": 0, "micro_step": 28}
    assert first == {**axes, "metrics": {"from an observer": 0.5}}
    assert second == {**axes, "metrics": {"top": 3.0}}


# --- figures, texts, histograms, artifacts


def test_media_are_files_with_a_record_each(
    recorder: Recorder, log: MetricLog, position: Position, tmp_path: Path
) -> None:
    picture, folder = tmp_path / "drawn.png", tmp_path / "folder"
    picture.write_bytes(PNG)
    folder.mkdir()
    recorder.phase, position.step = None, 12
    log_figure("confusion", picture)
    log_text("sample", "once upon a time")
    log_histogram("Weights", torch.tensor([0.0, 1.0]), bins=2)
    log_artifact("files", folder)
    records = records_of(log)
    assert [(r["kind"], r["step"], r["name"]) for r in records] == [
        ("figure", 12, "confusion"),
        ("text", 12, "sample"),
        ("histogram", 12, "Weights"),
        ("artifact", 12, "files"),
    ]
    assert {tuple(record) for record in records} == {("kind", "step", "time", "name", "file")}
    assert records[0]["file"] == "media/confusion/step-00000012.png"
    home = log.path.parent
    assert (home / records[0]["file"]).read_bytes() == PNG
    assert (home / records[1]["file"]).read_text() == "once upon a time"
    assert json.loads((home / records[2]["file"]).read_text())["counts"] == [1, 1]
    assert (home / records[3]["file"]).is_dir()


def test_what_a_micro_batch_draws_belongs_to_the_step_it_is_going_to_be(
    recorder: Recorder, log: MetricLog, position: Position
) -> None:
    position.step = 4
    log_text("note", "in training")
    with recorder.evaluating():
        log_text("note", "in the evaluation")
    assert [record["step"] for record in records_of(log)] == [5, 4]


@pytest.mark.parametrize(
    "write",
    [
        lambda: log_metric("", 1.0),
        lambda: log_figure("", "x.png"),
        lambda: log_text("", "x"),
        lambda: log_histogram("", [1.0]),
        lambda: log_artifact("", "x"),
    ],
)
@pytest.mark.usefixtures("recorder")
def test_everything_needs_a_name(write: Callable[[], None], log: MetricLog) -> None:
    with pytest.raises(ValueError, match="metric_name must be a non-empty string"):
        write()
    assert records_of(log) == []


@pytest.mark.usefixtures("recorder")
def test_a_full_disk_costs_a_figure_and_one_warning(
    log: MetricLog, full_disk: Callable[[int], AbstractContextManager[None]], tmp_path: Path
) -> None:
    picture = tmp_path / "drawn.png"
    picture.write_bytes(PNG + b"x" * 5000)
    with (
        pytest.warns(UserWarning, match=r"figure 'plot' in .*cannot be kept: .*goes on without"),
        full_disk(2000),
    ):
        log_figure("plot", picture)
    with full_disk(2000):
        log_figure("plot", picture)
        log_text("short", "this one fits")
    log_figure("plot", picture)
    assert [record["name"] for record in records_of(log)] == ["short", "plot"]
    assert not list(log.path.parent.rglob(".partial*"))


# --- compiled, traced and exported models


class Logging(nn.Module):
    """Logs in its forward, as a user's model may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        log_metric("mean", y.mean())
        log_metric("rows", x.shape[0], reduce="sum")
        log_histogram("outputs", y)
        return y.relu()


def build(seed: int = 0) -> Logging:
    torch.manual_seed(seed)
    return Logging()


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """Graphs that were compiled by the backend of `compiled`."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield []
    torch._dynamo.reset()


# After any break of a graph, torch 2.15 looks whether its inputs have a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_logs_each_call_and_computes_the_same(
    graphs: list[torch.fx.GraphModule], recorder: Recorder, log: MetricLog
) -> None:
    def compile_nothing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    eager, model = build(), build()
    model.compile(backend=compile_nothing)
    found, expected = [], []
    for size in (2, 3, 4, 5, 6, 7):
        x = torch.randn(size, 4)
        torch.testing.assert_close(model(x), eager(x))
        (compiled_mean, compiled_rows), (eager_mean, eager_rows) = _values(recorder)
        found.append((compiled_mean, compiled_rows))
        expected.append((eager_mean, eager_rows))
    torch.testing.assert_close(found, expected)
    assert [rows for _, rows in found] == [2, 3, 4, 5, 6, 7]
    # It was compiled, and not anew for each call.
    assert 0 < len(graphs) <= 8
    kinds = [record["kind"] for record in records_of(log)]
    assert kinds == ["histogram"] * 12
    # Four pieces of the forward, for one size and for any, and some that have no graph. What is
    # behind the calls is no business of the compiler's, whose limits it would exhaust.
    from torch._dynamo.utils import counters

    assert counters["frames"]["total"] <= 12


def _values(recorder: Recorder) -> list[list[float]]:
    values = [float(value) for _, value in recorder.train.take()]
    return [values[:2], values[2:]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_in_a_run_works_after_it(
    log: MetricLog, position: Position, graphs: list[torch.fx.GraphModule]
) -> None:
    model = build()
    model.compile(backend="eager")
    x = torch.randn(2, 4)
    with Recorder(log, position) as recorder:
        recorder.phase = recorder.train
        inside = model(x)
        assert len(recorder.train.take()) == 2
    torch.testing.assert_close(model(x), inside)
    assert not recorder.train.pending


def test_outside_of_a_run_a_model_that_logs_compiles_to_one_graph(
    graphs: list[torch.fx.GraphModule],
) -> None:
    model, eager = build(), build()
    model.compile(backend="eager", fullgraph=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), eager(x))


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its own functions
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_logs_can_be_exported(is_strict: bool) -> None:
    model, x = build(), torch.randn(2, 4)
    program = torch.export.export(model, (x,), strict=is_strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_an_export_in_the_middle_of_a_run_logs_nothing(recorder: Recorder) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            log_metric("mean", x.mean())
            return x + 1

    torch.export.export(Plain(), (torch.randn(2, 4),), strict=False)
    assert finish_window(recorder) == {}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # and still used
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_model_that_is_traced_in_a_run_logs_nothing_and_has_nothing_in_it(
    recorder: Recorder, log: MetricLog
) -> None:
    model, x = build(), torch.randn(2, 4)
    trace: Any = torch.jit.trace
    traced = trace(model, (x,), check_trace=False)  # the check runs the model as it is
    assert finish_window(recorder) == {}
    assert records_of(log) == []
    torch.testing.assert_close(traced(x), model(x))
    assert "mean" not in str(traced.graph)


def test_logging_takes_no_part_in_the_gradient(recorder: Recorder) -> None:
    value = torch.tensor(2.0, requires_grad=True)
    loss = value * value
    log_metric("squared", loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert math.isclose(float(value.grad), 4.0)
    assert finish_window(recorder) == {"train/squared": 4.0}
