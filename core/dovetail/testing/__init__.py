"""Conformance suites and pytest fixtures for authors of plugins.

A suite holds a backend against the contract of its hook. Subclass it in a test file, where pytest
finds its checks, or call its `check`, which raises one error that names every check that failed:

    class TestScaled(CollatorSuite):
        backend = "scaled"
        samples = [{"features": row, "labels": i} for i, row in enumerate(torch.eye(3))]

    CollatorSuite.check(backend="scaled", samples=SAMPLES)

Names are resolved when they are first used: pytest imports this package for its fixtures in every
session of an environment, also where nobody tests a plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.testing.accumulator import AccumulatorSuite
    from dovetail.testing.collator import CollatorSuite
    from dovetail.testing.compiler import CompilerSuite
    from dovetail.testing.exporter import ExporterSuite
    from dovetail.testing.suite import ConformanceError, Suite
    from dovetail.testing.tracker import TrackerSuite
    from dovetail.testing.wrapper import WrapperSuite

_HOME = {
    "AccumulatorSuite": "accumulator",
    "CollatorSuite": "collator",
    "CompilerSuite": "compiler",
    "ConformanceError": "suite",
    "ExporterSuite": "exporter",
    "Suite": "suite",
    "TrackerSuite": "tracker",
    "WrapperSuite": "wrapper",
}
"""Module that holds each public name."""

__all__ = [
    "AccumulatorSuite",
    "CollatorSuite",
    "CompilerSuite",
    "ConformanceError",
    "ExporterSuite",
    "Suite",
    "TrackerSuite",
    "WrapperSuite",
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
