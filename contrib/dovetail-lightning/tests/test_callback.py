from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from dovetail import RunInfo, hookimpl
from dovetail.errors import ConfigError
from dovetail.registry import Registry
from dovetail.run.tracking import read_records
from dovetail_lightning import MetricLogCallback


class Planted(Callback):
    """Raises after so many micro-batches."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.number, self.error, self.count = number, error, 0

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.count += 1
        if self.count == self.number:
            raise self.error


def kinds_of(records: list[dict[str, Any]]) -> list[str]:
    return [record["kind"] for record in records]


def test_callback_writes_the_folder_of_a_run(job: Any) -> None:
    fitted = job.log()
    names = {path.name for path in fitted.run_dir.iterdir()}
    assert {"config.toml", "plugins.lock.json", "metrics.jsonl"} <= names
    each_epoch = ["step"] * 3 + ["evaluation"]
    assert kinds_of(fitted.records) == ["params", *each_epoch, *each_epoch, "end"]
    first = fitted.records[1]
    assert (first["step"], first["epoch"], first["micro_step"]) == (1, 0, 4)
    assert set(first["metrics"]) == {"train/loss", "train/lr", "train/grad_norm", "train/size"}
    assert first["wait_s"] >= 0
    assert fitted.records[0]["params"]["train.epochs"] == 2
    assert fitted.records[-1]["status"] == "completed"


def test_callback_feeds_the_config_s_trackers(job: Any) -> None:
    seen: list[tuple[int, float]] = []
    status = []

    class Tracker:
        capabilities: frozenset[str] = frozenset()

        def log_figure(self, name: str, path: Path, step: int) -> None:
            raise AssertionError(name)

        def log_artifact(self, name: str, path: Path) -> None:
            raise AssertionError(name)

        def log(self, metrics: Any, step: int) -> None:
            seen.extend((step, v) for k, v in metrics.items() if k == "train/loss")

        def log_params(self, params: Any) -> None:
            pass

        def close(self, how: str) -> None:
            status.append(how)

    class Plugin:
        dovetail_api = 1

        @hookimpl
        def dovetail_log(self, run: RunInfo) -> Tracker:
            return Tracker()

    registry = Registry()
    registry.register(Plugin(), hook="log", name="mine")
    fitted = job.log(module=job.module("log.use=mine", registry=registry))
    steps = [record for record in fitted.records if record["kind"] == "step"]
    assert seen == [(r["step"], r["metrics"]["train/loss"]) for r in steps]
    assert status == ["completed"]


def test_callback_records_system_metrics(job: Any) -> None:
    (record,) = [r for r in job.log("log.system_s=60").records if r["kind"] == "system"]
    assert record["metrics"]["system/memory_gib"] > 0
    assert record["metrics"]["system/items_per_s"] > 0


def test_callback_says_how_a_run_failed(job: Any) -> None:
    callback = MetricLogCallback()
    with pytest.raises(ZeroDivisionError):
        job.fit(callbacks=[callback, Planted(6, ZeroDivisionError("planted"))])
    assert callback.run_dir is not None
    records = list(read_records(callback.run_dir))
    assert kinds_of(records) == ["params", "step", "end"]
    assert records[-1]["status"] == "failed"
    assert records[-1]["error"] == "ZeroDivisionError: planted"


def test_callback_says_that_a_run_was_interrupted(job: Any) -> None:
    import signal

    callback = MetricLogCallback()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # how Lightning ends an interrupted program
            job.fit(callbacks=[callback, Planted(6, KeyboardInterrupt())])
    finally:
        signal.signal(signal.SIGINT, before)
    assert callback.run_dir is not None
    assert list(read_records(callback.run_dir))[-1]["status"] == "interrupted"


def test_callback_records_windows_that_were_skipped(job: Any) -> None:
    module = job.module("train.epochs=1")
    module.model.bad_passes = (6,)
    with pytest.warns(UserWarning, match="is skipped"):
        records = job.log(module=module).records
    assert kinds_of(records) == ["params", "step", "skip", "step", "evaluation", "end"]
    assert [r["step"] for r in records[1:4]] == [1, 1, 2]
    assert records[2]["loss"] == "NaN"


@pytest.mark.parametrize("number", [8, 20])
def test_callback_goes_on_in_the_log_of_a_checkpoint(
    job: Any, save_at: Any, tmp_path: Path, number: int
) -> None:
    path = tmp_path / "some.ckpt"
    whole = job.log(callbacks=[save_at(path, number)])
    resumed = job.log(ckpt_path=path)
    assert resumed.run_dir == whole.run_dir

    def essence(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [record for record in records if record["kind"] != "params"]
        return [{k: v for k, v in r.items() if k not in ("time", "wait_s")} for r in kept]

    assert essence(resumed.records) == essence(whole.records)


def test_callback_begins_anew_when_the_folder_is_gone(
    job: Any, save_at: Any, tmp_path: Path
) -> None:
    path = tmp_path / "some.ckpt"
    whole = job.log(callbacks=[save_at(path, 16)])
    shutil.rmtree(whole.run_dir)
    resumed = job.log(ckpt_path=path)
    assert resumed.run_dir != whole.run_dir
    assert [r["step"] for r in resumed.records if r["kind"] == "step"] == [5, 6]


def test_callback_refuses_module_without_config() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(ConfigError, match=r"got a LightningModule, .*dovetail.MetricsTracker"):
        MetricLogCallback().setup(trainer, pl.LightningModule(), "fit")
