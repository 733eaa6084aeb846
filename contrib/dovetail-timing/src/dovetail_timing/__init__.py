"""Says how long each hook of a run took, and each export.

One line for each goes to the logger `dovetail_timing` at level INFO. Where the program has not set
up logging, the lines go to stderr.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

from dovetail import Exporter, hookimpl
from dovetail_timing._exporter import TimedExporter
from dovetail_timing._stopwatch import measure

__all__ = ["TimedExporter", "dovetail_api"]

dovetail_api = 1

Part = TypeVar("Part")


@hookimpl(wrapper=True)
def dovetail_compile() -> Generator[None, Any, Any]:
    """Time the hook. What a compiler does at the first batch is not in it."""
    return (yield from _timed("dovetail_compile"))


@hookimpl(wrapper=True)
def dovetail_collate() -> Generator[None, Any, Any]:
    """Time the hook."""
    return (yield from _timed("dovetail_collate"))


@hookimpl(wrapper=True)
def dovetail_accumulate() -> Generator[None, Any, Any]:
    """Time the hook."""
    return (yield from _timed("dovetail_accumulate"))


@hookimpl(wrapper=True)
def dovetail_log() -> Generator[None, Any, Any]:
    """Time the hook."""
    return (yield from _timed("dovetail_log"))


@hookimpl(wrapper=True)
def dovetail_export() -> Generator[None, Any, Any]:
    """Time the hook, and later each export."""
    exporter: Any = yield from _timed("dovetail_export")
    return TimedExporter(exporter) if isinstance(exporter, Exporter) else exporter


def _timed(hook: str) -> Generator[None, Part, Part]:
    with measure(hook) as timing:
        part = yield
        timing.result = type(part).__name__
    return part
