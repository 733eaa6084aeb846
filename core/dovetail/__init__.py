"""dovetail: a plugin framework for training PyTorch models.

Names are resolved when they are first used, so that `import dovetail` costs nothing that is not
needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dovetail._version import __version__

if TYPE_CHECKING:
    from dovetail._markers import API_VERSION, hookimpl
    from dovetail.config import ConfigPath, PluginOptions, TrainingConfig
    from dovetail.errors import (
        BundleError,
        ConfigError,
        DataError,
        DovetailError,
        ExportError,
        ModelError,
        PluginError,
        RunError,
    )
    from dovetail.pipeline import TrainingResult, train
    from dovetail.run.tracking import read_metrics
    from dovetail.run.tracking.metrics_tracker import MetricsTracker
    from dovetail.run.tracking.recording import (
        log_artifact,
        log_figure,
        log_histogram,
        log_metric,
        log_text,
    )
    from dovetail.task import TaskSpec, TensorSpec
    from dovetail.types import (
        AccumulationStats,
        Accumulator,
        Artifact,
        Collator,
        Exporter,
        ExportInputs,
        Recipe,
        RunInfo,
        Runner,
        Tracker,
        WindowResult,
    )

_HOME = {
    "API_VERSION": "_markers",
    "AccumulationStats": "types",
    "Accumulator": "types",
    "Artifact": "types",
    "BundleError": "errors",
    "Collator": "types",
    "ConfigError": "errors",
    "ConfigPath": "config",
    "DataError": "errors",
    "DovetailError": "errors",
    "ExportError": "errors",
    "ExportInputs": "types",
    "Exporter": "types",
    "MetricsTracker": "run.tracking.metrics_tracker",
    "ModelError": "errors",
    "PluginError": "errors",
    "PluginOptions": "config",
    "Recipe": "types",
    "RunError": "errors",
    "RunInfo": "types",
    "Runner": "types",
    "TaskSpec": "task",
    "TensorSpec": "task",
    "Tracker": "types",
    "TrainingConfig": "config",
    "TrainingResult": "pipeline",
    "WindowResult": "types",
    "hookimpl": "_markers",
    "log_artifact": "run.tracking.recording",
    "log_figure": "run.tracking.recording",
    "log_histogram": "run.tracking.recording",
    "log_metric": "run.tracking.recording",
    "log_text": "run.tracking.recording",
    "read_metrics": "run.tracking",
    "train": "pipeline",
}
"""Module that holds each public name."""

__all__ = [
    "API_VERSION",
    "AccumulationStats",
    "Accumulator",
    "Artifact",
    "BundleError",
    "Collator",
    "ConfigError",
    "ConfigPath",
    "DataError",
    "DovetailError",
    "ExportError",
    "ExportInputs",
    "Exporter",
    "MetricsTracker",
    "ModelError",
    "PluginError",
    "PluginOptions",
    "Recipe",
    "RunError",
    "RunInfo",
    "Runner",
    "TaskSpec",
    "TensorSpec",
    "Tracker",
    "TrainingConfig",
    "TrainingResult",
    "WindowResult",
    "__version__",
    "hookimpl",
    "log_artifact",
    "log_figure",
    "log_histogram",
    "log_metric",
    "log_text",
    "read_metrics",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
