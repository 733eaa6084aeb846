"""Everything that can fail late, tried early: before a run has a folder and a first step."""

from __future__ import annotations

from dovetail.preflight.checking import CheckedConfig, ConfigSource, check_config
from dovetail.preflight.making import build_model, build_recipe, build_splits
from dovetail.preflight.trial import (
    check_collator,
    check_monitor,
    check_output_size,
    try_one_batch,
)

__all__ = [
    "CheckedConfig",
    "ConfigSource",
    "build_model",
    "build_recipe",
    "build_splits",
    "check_collator",
    "check_config",
    "check_monitor",
    "check_output_size",
    "try_one_batch",
]
