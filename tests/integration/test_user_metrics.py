from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import dovetail
from dovetail import (
    hookimpl,
    log_artifact,
    log_figure,
    log_histogram,
    log_metric,
    log_text,
    train,
)
from dovetail.errors import ConfigError
from dovetail.registry import Registry
from dovetail.run.observer import RunObserver
from dovetail.run.tracking import read_records

OWN = {"train/loss", "train/lr", "train/grad_norm"}


class Mean(nn.Module):
    """A linear model whose loss function is `loss_that_logs`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(features)
        return logits


def loss_that_logs(outputs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log three metrics of the micro-batch, as the sum of the number of each sample tells."""
    number, size = batch["number"].double(), len(batch["number"])
    log_metric("number", number.mean())
    log_metric("largest", number.max(), reduce="max")
    log_metric("sizes/samples", size, reduce="sum")
    loss = nn.functional.cross_entropy(outputs, batch["labels"])
    return loss, torch.tensor(size)


def samples_of(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 6, generator=generator)
    return [
        {"features": x, "labels": torch.tensor(int(x[0] > 0)), "number": torch.tensor(n)}
        for n, x in enumerate(features)
    ]


@pytest.fixture
def run(
    config: dict[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Train a small model with `loss_that_logs`, or another loss, unshuffled."""
    module: Any = types.ModuleType("losses_that_log")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config["task"] = {"kind": "classification", "num_classes": 2, "modality": "tabular"}
    config["train"] |= {"epochs": 1, "batch_size": 4, "loss": "losses_that_log:loss"}
    config["data"] = {"shuffle": False}

    def start(
        data: Any, *, loss: Callable[..., Any] = loss_that_logs, model: Any = None, **keywords: Any
    ) -> dovetail.TrainingResult:
        module.loss = loss
        torch.manual_seed(5)
        return train(config, model=model or Mean(), data=data, registry=registry, **keywords)

    return start


def records_of(result: dovetail.TrainingResult | Path, kind: str) -> list[dict[str, Any]]:
    folder = result if isinstance(result, Path) else result.run_dir
    return [record for record in read_records(folder) if record["kind"] == kind]


@pytest.mark.parametrize(
    ("num_batches", "steps", "expected"),
    [(40, 1, 40), (40, 2, 20), (40, 4, 10), (40, 8, 5), (43, 4, 11)],
)
def test_three_metrics_per_micro_batch_are_one_record_per_optimizer_step(
    run: Callable[..., Any],
    config: dict[str, Any],
    num_batches: int,
    steps: int,
    expected: int,
) -> None:
    config["accumulate"]["exact"]["steps"] = steps
    # The last micro-batch has one sample, so that items count.
    count = 4 * (num_batches - 1) + 1
    result = run({"train": samples_of(count)})
    records = records_of(result, "step")
    assert len(records) == result.num_steps == expected
    for index, record in enumerate(records):
        window = range(index * steps * 4, min((index + 1) * steps * 4, count))
        assert record["items"] == len(window)
        assert set(record["metrics"]) == OWN | {
            "train/number",
            "train/largest",
            "sizes/samples",
        }
        assert record["metrics"]["train/number"] == pytest.approx(sum(window) / len(window))
        assert record["metrics"]["train/largest"] == window[-1]
        assert record["metrics"]["sizes/samples"] == len(window)
        assert 0 <= record["wait_s"] < 60


def test_an_evaluation_has_the_means_over_its_split(run: Callable[..., Any]) -> None:
    result = run({"train": samples_of(8), "validation": samples_of(10)})
    (record,) = records_of(result, "evaluation")
    assert record["metrics"]["val/number"] == pytest.approx(4.5)
    assert record["metrics"]["val/largest"] == 9
    assert record["metrics"]["sizes/samples"] == 10
    assert result.final_metrics["val/number"] == pytest.approx(4.5)


@pytest.mark.filterwarnings("ignore:training after step")
@pytest.mark.filterwarnings("ignore:metric .* is nan for the first time")
def test_what_a_skipped_window_logged_counts_nowhere(
    run: Callable[..., Any], config: dict[str, Any]
) -> None:
    config["accumulate"]["exact"]["steps"] = 2

    def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        found, items = loss_that_logs(outputs, batch)
        return found * (math.nan if 9 in batch["number"] else 1), items

    result = run({"train": samples_of(24)}, loss=loss)
    assert len(records_of(result, "skip")) == 1
    found = [record["metrics"]["train/largest"] for record in records_of(result, "step")]
    assert found == [7, 23]
    sizes = [record["metrics"]["sizes/samples"] for record in records_of(result, "step")]
    assert sizes == [8, 8]


def test_a_resumed_run_logs_what_one_that_never_stopped_does(
    run: Callable[..., Any], config: dict[str, Any]
) -> None:
    config["train"] |= {"epochs": 2, "checkpoint_steps": 3}
    config["data"]["shuffle"] = True
    data = {"train": samples_of(90), "validation": samples_of(10)}
    whole = run(data)
    stop_at = 4

    class Crash(RunObserver):
        def on_step(self, epoch: int, micro_batch: int, step: int, metrics: Any) -> None:
            log_text("note", f"step {step}")
            if step == stop_at:
                raise RuntimeError("planted")

    for stop_at in (4, 8):
        keywords = {"resume": "latest"} if stop_at == 8 else {}
        if not keywords:
            config["run"]["name"] = "crashing"
        with pytest.raises(RuntimeError, match="planted"):
            run(data, observer=Crash(), **keywords)
    resumed = run(data, resume="latest")
    for kind in ("step", "evaluation"):
        mine, theirs = records_of(resumed, kind), records_of(whole, kind)
        assert [r["step"] for r in mine] == [r["step"] for r in theirs]
        assert [r["metrics"] for r in mine] == [r["metrics"] for r in theirs]
    notes = records_of(resumed, "text")
    assert [record["step"] for record in notes] == sorted(record["step"] for record in notes)
    for record in notes:
        assert (resumed.run_dir / record["file"]).read_text() == f"step {record['step']}"


def test_a_stream_resumes_with_the_metrics_of_its_data(
    run: Callable[..., Any], config: dict[str, Any]
) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            for sample in samples_of(40):
                log_metric("read", sample["number"], reduce="sum")
                yield sample

    config["train"] |= {"max_steps": 3, "checkpoint_steps": 1}
    config["accumulate"]["exact"]["steps"] = 2
    config["train"]["schedule"] = "constant"
    run({"train": Stream()})
    config["train"]["max_steps"] = 10
    result = run({"train": Stream()}, resume="latest")
    found = [record["metrics"]["train/read"] for record in records_of(result, "step")]
    assert found == [sum(range(start, start + 8)) for start in range(0, 40, 8)]


def test_the_data_code_and_the_collator_log_with_their_micro_batch(
    run: Callable[..., Any], config: dict[str, Any], registry: Registry
) -> None:
    class Plugin:
        @hookimpl
        def dovetail_collate(self) -> Any:
            def collate(samples: list[Any]) -> dict[str, Tensor]:
                log_metric("collated", len(samples), reduce="sum")
                return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}

            return collate

    registry.register(Plugin(), hook="collate", name="logging")
    config["collate"] = {"use": "logging"}
    config["accumulate"]["exact"]["steps"] = 2
    result = run({"train": samples_of(18), "validation": samples_of(5)})
    found = [record["metrics"]["train/collated"] for record in records_of(result, "step")]
    assert found == [8, 8, 2]
    (record,) = records_of(result, "evaluation")
    assert record["metrics"]["val/collated"] == 5


def test_an_observer_logs_for_the_step_that_was(run: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "drawn.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")

    class Watcher(RunObserver):
        def on_step(self, epoch: int, micro_batch: int, step: int, metrics: Any) -> None:
            log_metric("seen", metrics["train/number"])

        def on_evaluation(self, epoch: int, step: int, metrics: Any) -> None:
            log_figure("confusion", picture)
            log_histogram("weights", torch.ones(3))

        def on_checkpoint(self, path: Path, is_best: bool) -> None:
            log_artifact("checkpoint", path)

    result = run({"train": samples_of(32), "validation": samples_of(4)}, observer=Watcher())
    steps = records_of(result, "step")
    values = records_of(result, "values")
    assert [r["step"] for r in values] == [r["step"] for r in steps] == [1, 2]
    assert [r["metrics"] for r in values] == [{"seen": r["metrics"]["train/number"]} for r in steps]
    figure = records_of(result, "figure")[0]  # the run's own comes at its end
    assert (figure["step"], figure["file"]) == (2, "media/confusion/step-00000002.png")
    assert (result.run_dir / figure["file"]).is_file()
    assert len(records_of(result, "histogram")) == 1
    (artifact,) = records_of(result, "artifact")
    assert artifact["file"] == f"checkpoints/{result.last_checkpoint.name}"


def test_an_observer_of_a_checkpoint_at_the_end_logs_for_the_step_that_was(
    run: Callable[..., Any],
) -> None:
    class Watcher(RunObserver):
        def on_checkpoint(self, path: Path, is_best: bool) -> None:
            log_metric("saved", 1)

    result = run({"train": samples_of(32)}, observer=Watcher())
    (record,) = records_of(result, "values")
    assert (record["step"], record["metrics"]) == (2, {"saved": 1.0})


def test_a_model_that_logs_works_before_and_after_its_run(run: Callable[..., Any]) -> None:
    class Logging(Mean):
        def forward(self, features: Tensor) -> Tensor:
            logits = super().forward(features)
            log_metric("logit", logits.mean())
            log_metric("calls", 1, reduce="sum")
            return logits

    model, x = Logging(), torch.randn(2, 6)
    model(x)
    result = run({"train": samples_of(32)}, model=model)
    # A trial batch before the run is none of its own.
    assert [r["metrics"]["train/calls"] for r in records_of(result, "step")] == [4, 4]
    size = (result.run_dir / "metrics.jsonl").stat().st_size
    result.model(x)
    assert (result.run_dir / "metrics.jsonl").stat().st_size == size


def test_without_metrics_of_the_users_the_records_have_the_runs_own(
    run: Callable[..., Any], config: dict[str, Any]
) -> None:
    config["train"]["loss"] = "task"
    result = run({"train": samples_of(16), "validation": samples_of(4)})
    (record,) = records_of(result, "step")
    assert set(record["metrics"]) == OWN
    assert list(record) == [
        "kind", "step", "epoch", "micro_step", "time", "items", "wait_s", "metrics",
    ]  # fmt: skip
    (evaluation,) = records_of(result, "evaluation")
    assert set(evaluation["metrics"]) == {"val/loss", "val/accuracy"}
    assert not (result.run_dir / "media").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("", 1.0, "metric_name must be a non-empty string"),
        ("loss", 1.0, "'val/loss': the run logs a metric of this name itself"),
        ("m", "high", "non-numeric value: 'high', a str"),
        ("m", torch.zeros(4, 2), r"tensor of shape \(4, 2\).*\.mean\(\)"),
    ],
)
def test_bad_metrics_end_the_run_with_a_message(
    run: Callable[..., Any], name: str, value: Any, message: str
) -> None:
    def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        log_metric(name, value)
        return nn.functional.cross_entropy(outputs, batch["labels"])

    with pytest.raises(ConfigError, match=message):
        run({"train": samples_of(8)}, loss=loss)
