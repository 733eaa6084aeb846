"""Makes the trackers of a run: in the process of its trackers, or here where they must be."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dovetail.registry.chain import HookCall, PluginCall
from dovetail.registry.listing import SESSION
from dovetail.run.tracking.session import FLUSH_S
from dovetail.run.tracking.sidecar import Sidecar, SidecarRequest
from dovetail.types import RunInfo, Tracker

if TYPE_CHECKING:
    from dovetail.config import PluginOptions
    from dovetail.registry.calling import Registry

Follow: TypeAlias = Literal["process", "thread"]


@dataclass(frozen=True)
class TrackerChoice:
    """A tracker that a run names."""

    options: PluginOptions
    table: Mapping[str, Any] = field(default_factory=dict)
    """What the options were made of; another process makes them again."""


def make_trackers(
    registry: Registry,
    run: RunInfo,
    chosen: Mapping[str, TrackerChoice],
    *,
    follow: Follow = "process",
    config_dir: Path | None = None,
    flush_s: float = FLUSH_S,
    calls_per_s: float | None = None,
) -> tuple[dict[str, Tracker], Sidecar | None]:
    """Make the trackers of a run.

    A tracker of this session cannot be made in another process, nor one whose options say that it
    needs the process of the training.

    Args:
        registry: Where they come from.
        run: What they follow.
        chosen: Options by name.
        follow: Where they are fed from, as far as they can be.
        config_dir: Folder that relative paths in the options are meant from.
        flush_s: Seconds they get at the end of the run.
        calls_per_s: Calls per second that each gets at most.

    Returns:
        The trackers of this process by name, and the process of the others, if there are any.

    Raises:
        DovetailError: One of them cannot be made.
    """
    here = [
        name
        for name, choice in chosen.items()
        if follow == "thread" or not _can_be_elsewhere(registry, name, choice)
    ]
    there = {name: choice for name, choice in chosen.items() if name not in here}
    trackers: dict[str, Tracker] = {}
    try:
        for name in here:
            trackers[name] = registry.log(name, run, chosen[name].options)
        if not there:
            return trackers, None
        sidecar = _start_sidecar(registry, run, there, config_dir, flush_s, calls_per_s)
    except BaseException:
        for tracker in trackers.values():
            with suppress(Exception):  # there is an error to tell already
                tracker.close("failed")
        raise
    return trackers, sidecar


def _start_sidecar(
    registry: Registry,
    run: RunInfo,
    chosen: Mapping[str, TrackerChoice],
    config_dir: Path | None,
    flush_s: float,
    calls_per_s: float | None,
) -> Sidecar:
    around = registry.chain("log", next(iter(chosen)))[:-1]
    request = SidecarRequest(
        directory=str(run.directory),
        run_name=run.name,
        params=run.params,
        trackers={name: choice.table for name, choice in chosen.items()},
        config_dir=None if config_dir is None else str(config_dir),
        wrappers=tuple(f"{info.distribution}:{info.name}" for info in around),
        autoload=registry.admission.autoload,
        allow=registry.admission.allow,
        flush_s=flush_s,
        calls_per_s=calls_per_s,
    )
    sidecar = Sidecar(request)
    for name, calls in zip(chosen, sidecar.history, strict=True):
        infos = registry.chain("log", name)
        told = [
            PluginCall(info, call["duration_s"], call["result"])
            for info, call in zip(infos, calls, strict=True)
        ]
        registry.history.append(HookCall("log", told))
    return sidecar


def _can_be_elsewhere(registry: Registry, name: str, choice: TrackerChoice) -> bool:
    if not sys.executable or getattr(choice.options, "needs_training_process", False):
        return False
    if any(info.distribution == SESSION for info in registry.chain("log", name)):
        return False
    try:
        json.dumps(choice.table)
    except (TypeError, ValueError):  # a config made in Python may hold anything
        return False
    return True
