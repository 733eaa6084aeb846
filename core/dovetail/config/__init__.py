"""The config of a run: its sections, how it is read, and how its errors are told."""

from __future__ import annotations

from dovetail.config.loading import apply_overrides, parse_config, read_config_file
from dovetail.config.options import ConfigPath, PluginOptions
from dovetail.config.problems import explain
from dovetail.config.sections import (
    AUTO,
    OFF,
    DataConfig,
    DistributedConfig,
    HookSection,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrainingConfig,
)

__all__ = [
    "AUTO",
    "OFF",
    "ConfigPath",
    "DataConfig",
    "DistributedConfig",
    "HookSection",
    "ModelConfig",
    "PluginOptions",
    "RunConfig",
    "TrainConfig",
    "TrainingConfig",
    "apply_overrides",
    "explain",
    "parse_config",
    "read_config_file",
]
