"""What the config says and the Trainer has a word for: handed over, and held against each other."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from dovetail import ConfigError, TrainingConfig
from dovetail.errors import build_message
from dovetail.preflight import CheckedConfig

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}

HINT = "Make it with Trainer(**module.trainer_options())."


@dataclass(frozen=True)
class Accumulation:
    """What the config's accumulation comes to where the Trainer steps."""

    steps: int
    max_grad_norm: float | None
    is_norm_stated: bool
    """Whether the config names the norm, and does not merely leave it at its default."""


def read_accumulation(checked: CheckedConfig) -> Accumulation:
    """Return steps and norm of `[accumulate.exact]`.

    Raises:
        ConfigError: The backend is another one, or its windows are none that a Trainer has.
    """
    ((name, options),) = checked.options("accumulate").items()
    info = checked.registry.find("accumulate", name)
    if (info.name, info.distribution) != ("exact", "dovetail"):
        found = f"got {name!r}, which steps the optimizer itself"
        expected = '"exact", whose formula needs no loop of its own'
        hint = "Lightning's Trainer steps here; train with `dovetail train` for this backend."
        raise ConfigError(build_message("config accumulate.use", found, expected, hint))
    settings: Any = options
    if not isinstance(settings.steps, int):
        found = f"got {settings.steps!r}, a number that changes with the step"
        hint = "Use Lightning's GradientAccumulationScheduler, which changes it with the epoch."
        where = "config accumulate.exact.steps"
        raise ConfigError(build_message(where, found, "one number", hint))
    if settings.tokens_per_step is not None:
        found = f"got {settings.tokens_per_step}; the Trainer ends windows by micro-batches"
        hint = "Set accumulate.exact.steps, whose windows weigh every token alike, too."
        where = "config accumulate.exact.tokens_per_step"
        raise ConfigError(build_message(where, found, action=hint))
    norm = None if settings.max_grad_norm == "off" else settings.max_grad_norm
    is_stated = "max_grad_norm" in options.model_fields_set
    return Accumulation(settings.steps, norm, is_stated)


def build_trainer_options(config: TrainingConfig, accumulation: Accumulation) -> dict[str, Any]:
    """Return the arguments of a Trainer that trains as the config says.

    Raises:
        ConfigError: Lightning has no accelerator for `train.device`.
    """
    train = config.train
    device, _, index = train.device.partition(":")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in _ACCELERATORS:
        found = f"got {train.device!r}, for which Lightning has no accelerator"
        raise ConfigError(build_message("config train.device", found, '"auto", cpu, cuda or mps'))
    options: dict[str, Any] = {
        "accelerator": _ACCELERATORS[device],
        "devices": [int(index)] if index else 1,
        "max_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "accumulate_grad_batches": accumulation.steps,
        "precision": _PRECISIONS[train.precision],
    }
    if config.run.deterministic:
        options["deterministic"] = True
    return options


def check_config_for_lightning(config: TrainingConfig) -> None:
    """Refuse what only dovetail's own loop does.

    Raises:
        ConfigError: The config asks for FSDP2.
    """
    if config.distributed.strategy == "fsdp":
        hint = 'Train with `torchrun -m dovetail train`, or give the Trainer strategy="ddp".'
        raise ConfigError(
            build_message("config distributed.strategy", "got 'fsdp'", '"auto" or "ddp"', hint)
        )


def check_trainer(trainer: Trainer, config: TrainingConfig, accumulation: Accumulation) -> None:
    """Hold a Trainer against the config; what the config leaves at its default is the Trainer's.

    Raises:
        ConfigError: The two contradict each other.
    """
    is_plain = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not is_plain or isinstance(trainer.strategy, DeepSpeedStrategy):
        found = f"is a {type(trainer.strategy).__name__}"
        hint = "Exact steps need whole gradients on each rank; for FSDP2 use `dovetail train`."
        raise ConfigError(build_message("Trainer strategy", found, "one device, or ddp", hint))
    precision = _PRECISIONS[config.train.precision]
    deterministic = torch.are_deterministic_algorithms_enabled()
    rows: list[tuple[str, Any, Any, str, Any]] = [
        (
            "accumulate.exact.steps",
            accumulation.steps,
            1,
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
        ),
        ("train.precision", precision, "32-true", "precision", trainer.precision),
        ("run.deterministic", config.run.deterministic, False, "deterministic", deterministic),
    ]
    for path, wanted, default, argument, given in rows:
        if wanted not in (default, given):
            found = f"asks for {argument}={wanted!r}, and the Trainer has {given!r}"
            raise ConfigError(build_message(f"config {path}", found, "the same in both", HINT))
    if trainer.gradient_clip_val is not None and accumulation.is_norm_stated:
        found = f"got {accumulation.max_grad_norm}, and the Trainer has gradient_clip_val"
        found += f"={trainer.gradient_clip_val}"
        hint = "Remove one of the two."
        where = "config accumulate.exact.max_grad_norm"
        raise ConfigError(build_message(where, found, "one norm to clip to", hint))


def warn_of_ignored(trainer: Trainer, config: TrainingConfig) -> None:
    """Warn of what the config says and the Trainer does not do."""
    if config.export.use:
        found = f"got {', '.join(config.export.use)}; the Trainer exports nothing"
        _warn("config export.use", found, "Export with module.export(directory) afterwards.")
    train, is_trial = config.train, bool(getattr(trainer, "fast_dev_run", False))
    wanted = (train.epochs, train.max_steps or -1)
    given = (trainer.max_epochs, trainer.max_steps)
    if wanted != given and not is_trial:
        found = f"got {wanted[0]} epochs and {wanted[1]} steps, and the Trainer has {given[0]} and "
        found += f"{given[1]}, which count (-1: no limit)"
        _warn("config train.epochs, train.max_steps", found, HINT)


def _warn(where: str, found: str, action: str) -> None:
    warnings.warn(build_message(where, found, action=action), stacklevel=2)
