from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from dovetail.errors import ConfigError
from dovetail_lightning._settings import check_trainer, read_accumulation, warn_of_ignored


def trainer_of(job: Any, *overrides: str, **options: Any) -> tuple[pl.Trainer, Any, Any]:
    module = job.module(*overrides)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, **options)
    return trainer, module.config, read_accumulation(module.checked)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=7", {"max_epochs": 7, "max_steps": -1, "accelerator": "cpu", "devices": 1}),
        ("train.max_steps=5", {"max_steps": 5}),
        ("accumulate.exact.steps=3", {"accumulate_grad_batches": 3}),
        ("train.precision=bf16", {"precision": "bf16-mixed"}),
        ("train.precision=fp16", {"precision": "16-mixed"}),
        ("train.device=cuda:1", {"accelerator": "gpu", "devices": [1]}),
        ("run.deterministic=true", {"deterministic": True}),
    ],
)
def test_trainer_options_say_what_the_config_says(
    job: Any, override: str, expected: dict[str, Any]
) -> None:
    options = job.module(override).trainer_options()
    assert {key: options[key] for key in expected} == expected


def test_trainer_options_take_changes(job: Any) -> None:
    module = job.module("distributed.find_unused_parameters=true")
    options = module.trainer_options(devices=2, strategy="ddp", logger=False)
    assert options["strategy"] == "ddp_find_unused_parameters_true"
    assert (options["devices"], options["logger"]) == (2, False)


def test_trainer_options_refuse_device_without_accelerator(job: Any) -> None:
    with pytest.raises(ConfigError, match="got 'xpu', for which Lightning has no accelerator"):
        job.module("train.device=xpu").trainer_options()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("accumulate.exact.tokens_per_step=9", "the Trainer ends windows by micro-batches"),
        ("distributed.strategy=fsdp", "config distributed.strategy: got 'fsdp'"),
    ],
)
def test_module_refuses_what_no_trainer_does(job: Any, override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        job.module(override)


def test_module_refuses_steps_that_change(job: Any) -> None:
    text = job.path.read_text().replace("steps = 4", "steps = { 0 = 1, 9 = 4 }")
    job.path.write_text(text)
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        job.module()


def test_module_refuses_other_backend(job: Any) -> None:
    from dovetail import hookimpl
    from dovetail.registry import Registry

    class Plugin:
        dovetail_api = 1

        @hookimpl
        def dovetail_accumulate(self, model: nn.Module) -> None:
            return None

    registry = Registry()
    registry.register(Plugin(), hook="accumulate", name="mine")
    with pytest.raises(ConfigError, match="got 'mine', which steps the optimizer itself"):
        job.module("accumulate.use=mine", registry=registry)


@pytest.mark.parametrize(
    ("overrides", "options", "text"),
    [
        ([], {}, r"accumulate.exact.steps: asks for accumulate_grad_batches=4, and .* has 1"),
        ([], {"accumulate_grad_batches": 3}, "and the Trainer has 3"),
        (
            ["accumulate.exact.steps=1", "train.precision=bf16"],
            {},
            "asks for precision='bf16-mixed', and the Trainer has '32-true'",
        ),
        (
            ["accumulate.exact.steps=1", "accumulate.exact.max_grad_norm=2"],
            {"gradient_clip_val": 0.5},
            "got 2.0, and the Trainer has gradient_clip_val=0.5",
        ),
    ],
)
def test_check_trainer_refuses_contradiction(
    job: Any, overrides: list[str], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        check_trainer(*trainer_of(job, *overrides, accelerator="cpu", max_epochs=1, **options))


def test_check_trainer_leaves_defaults_to_the_trainer(job: Any) -> None:
    options = {"accumulate_grad_batches": 3, "precision": "bf16-mixed", "gradient_clip_val": 0.5}
    check_trainer(
        *trainer_of(
            job, "accumulate.exact.steps=1", accelerator="cpu", devices=1, max_epochs=1, **options
        )
    )


def test_check_trainer_refuses_sharded_gradients(job: Any) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    trainer, config, accumulation = trainer_of(job, accelerator="cpu", devices=1, max_epochs=1)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # which a CPU is refused for
    with pytest.raises(ConfigError, match="Trainer strategy: is a FSDPStrategy"):
        check_trainer(trainer, config, accumulation)


def test_trainer_that_runs_longer_is_warned_of(job: Any) -> None:
    trainer, config, _ = trainer_of(job, accelerator="cpu", devices=1, max_epochs=9)
    with pytest.warns(UserWarning, match="got 2 epochs and -1 steps, and the Trainer has 9 and -1"):
        warn_of_ignored(trainer, config)
