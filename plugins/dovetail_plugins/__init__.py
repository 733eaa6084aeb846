"""The built-in plugins of dovetail, one folder per hook, one file per plugin.

The names here are resolved when they are first used: importing the package imports no plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.types import AccumulationStats
    from dovetail_plugins.accumulate.exact import GradientAccumulator
    from dovetail_plugins.accumulate.guest import ExactBatches
    from dovetail_plugins.collate.text import LanguageModelingDataCollator
    from dovetail_plugins.collate.vision import VisionDataCollator

_HOME = {
    "AccumulationStats": "dovetail.types",
    "ExactBatches": "dovetail_plugins.accumulate.guest",
    "GradientAccumulator": "dovetail_plugins.accumulate.exact",
    "LanguageModelingDataCollator": "dovetail_plugins.collate.text",
    "VisionDataCollator": "dovetail_plugins.collate.vision",
}
"""Module that holds each public name."""

__all__ = [
    "AccumulationStats",
    "ExactBatches",
    "GradientAccumulator",
    "LanguageModelingDataCollator",
    "VisionDataCollator",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
