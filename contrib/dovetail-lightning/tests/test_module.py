from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, DataError, ModelError, NonFiniteLossError
from dovetail.registry import Registry


class Options(PluginOptions):
    scale: float = 1.0
    """Factor on every feature."""


# Resuming


# After 8 a window ends, after 12 an epoch; 2 and 17 are in the middle of a window.
@pytest.mark.parametrize("number", [2, 8, 12, 17])
def test_module_resumes_to_the_bit(job: Any, save_at: Any, tmp_path: Path, number: int) -> None:
    path = tmp_path / "some.ckpt"
    whole = job.fit("model.kwargs.dropout=0.2", callbacks=[save_at(path, number)])
    resumed = job.fit("model.kwargs.dropout=0.2", ckpt_path=path)
    assert resumed.module.num_steps == whole.module.num_steps == 6
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight)


def test_stream_resumes_without_the_batch_that_was_read_ahead(
    job: Any, save_at: Any, tmp_path: Path
) -> None:
    path = tmp_path / "some.ckpt"
    stream = ["data.kwargs.kind=stream", "train.schedule=constant", "train.warmup_ratio=0"]
    whole = job.fit(*stream, callbacks=[save_at(path, 6)])
    resumed = job.fit(*stream, ckpt_path=path)
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight)


# What is not finite


def test_window_that_is_not_finite_changes_nothing(job: Any) -> None:
    module = job.module("train.epochs=1", "train.schedule=constant", "train.warmup_ratio=0")
    module.model.bad_passes = (6,)  # one of the second of three windows
    with pytest.warns(UserWarning, match="training after step 1: the window is skipped"):
        job.fit(module=module)
    assert module.num_steps == 2
    assert all(bool(weight.isfinite().all()) for weight in module.model.parameters())


def test_run_ends_after_too_many_windows_in_a_row(job: Any) -> None:
    module = job.module("train.max_skipped_windows=2")
    module.model.bad_passes = range(100)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(NonFiniteLossError, match="2 windows in a row"),
    ):
        job.fit(module=module)


# Parts of the config


def test_module_stops_early_as_patience_says(job: Any) -> None:
    fitted = job.log("train.lr=1e-30", "train.epochs=9", "train.patience=2")
    assert fitted.trainer.current_epoch == 3
    assert fitted.records[-1]["status"] == "stopped early"


def test_module_compiles_with_the_config_s_backend(job: Any) -> None:
    seen = []

    class Compiler:
        dovetail_api = 1

        @hookimpl
        def dovetail_compile(self, model: nn.Module) -> nn.Module:
            seen.append(model)
            return model

    registry = Registry()
    registry.register(Compiler(), hook="compile", name="mine")
    module = job.module("compile.use=mine", "train.epochs=1", registry=registry)
    job.fit(module=module)
    assert seen == [module.model]


def test_module_runs_device_transform_before_the_model(job: Any, error_of: Any) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return features * self.factor

    class Collator:
        def __init__(self, scale: float, transform: nn.Module | None) -> None:
            self._scale = scale
            self.device_transform = transform

        def __call__(self, samples: Any) -> dict[str, torch.Tensor]:
            features = torch.stack([sample["features"] for sample in samples]) * self._scale
            labels = torch.tensor([sample["labels"] for sample in samples])
            return {"features": features, "labels": labels}

    class Plugin:
        dovetail_api = 1

        @hookimpl
        def dovetail_collate(self, options: Options) -> Collator:
            return Collator(options.scale, Scale() if options.scale == 1 else None)

    registry = Registry()
    registry.register(Plugin(), hook="collate", name="mine")
    here = job.fit(module=job.module("collate.use=mine", "collate.mine.scale=3", registry=registry))
    there = job.fit(module=job.module("collate.use=mine", registry=registry))
    assert error_of(there.weights, here.weights) <= 1e-6
    assert not [name for name in there.module.state_dict() if "factor" in name]


def test_module_logs_for_lightning_s_own_callbacks(job: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    fitted = job.fit(callbacks=[checkpoint], enable_checkpointing=True)
    metrics = fitted.trainer.callback_metrics
    assert {"train/loss", "train/grad_norm", "val/loss", "val/accuracy"} <= metrics.keys()
    assert math.isclose(
        float(metrics["val/loss"]), fitted.module.last_evaluation["val/loss"], rel_tol=1e-6
    )
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    fresh = job.module()
    fresh.load_state_dict(saved["state_dict"])
    assert all(torch.equal(fresh.model.state_dict()[k], v) for k, v in fitted.weights.items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_module_validates_and_predicts_without_fit(job: Any) -> None:
    module = job.module()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (metrics,) = trainer.validate(module, verbose=False)
    assert math.isclose(metrics["val/loss"], module.last_evaluation["val/loss"], rel_tol=1e-6)
    rows = torch.utils.data.DataLoader([{"features": torch.ones(5, 6)}], batch_size=None)
    (logits,) = trainer.predict(module, rows)
    assert logits.shape == (5, 3)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # on larger machines
def test_trainer_takes_loaders_of_the_user(job: Any, error_of: Any) -> None:
    module = job.module("data.factory=lightning_job:load", "data.kwargs.kind=loaders")
    train, validation = module._data.require().train, module._data.require().validation
    other = job.module("data.kwargs.num=3")
    trainer = pl.Trainer(
        **other.trainer_options(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    )
    trainer.fit(other, train, validation)
    expected = job.fit(module=module)
    assert error_of(other.model.state_dict(), expected.weights) <= 1e-6


def test_module_exports_bundle(job: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"config export.use: got pytorch; the Trainer exports no"):
        fitted = job.fit("train.epochs=1", "export.use=pytorch")
    report = fitted.module.export(tmp_path / "bundle")
    assert [artifact.format for artifact in report.artifacts] == ["pytorch"]
    assert (tmp_path / "bundle" / "manifest.json").is_file()


# Errors, before the first step


def test_module_says_what_is_wrong_with_the_config(job: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        job.module("train.lr=-1", "accumulate.exact.steps=0")
    assert "train.lr" in str(caught.value)
    assert "accumulate.exact.steps" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "kind", "text"),
    [
        ("train.monitor=val/nothing", ConfigError, "there is no metric 'val/nothing'"),
        ("task.num_classes=7", ModelError, "the task has 7 classes"),
        ("data.kwargs.num=0", DataError, "split 'train': is empty"),
    ],
)
def test_fit_refuses_before_the_first_step(
    job: Any, override: str, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        job.fit(override)


def test_fit_refuses_schedule_when_data_have_no_length(job: Any) -> None:
    with pytest.raises(ConfigError, match=r"config train.schedule: 'cosine' needs the number of"):
        job.fit("data.kwargs.kind=stream")


def test_fit_refuses_loss_that_is_not_additive(job: Any) -> None:
    text = "def loss(outputs, batch):\n    return outputs.square().mean()\n"
    (job.path.parent / "pairs.py").write_text(f"{text}loss.is_additive = False\n")
    with pytest.raises(ConfigError, match="is_additive = False"):
        job.fit("train.loss=pairs:loss")


def test_fit_needs_data(job: Any) -> None:
    text = job.path.read_text().replace('[data]\nfactory = "lightning_job:load"\n', "")
    job.path.write_text(text)
    with pytest.raises(ConfigError, match=r"config data.factory: nothing given"):
        job.fit()
