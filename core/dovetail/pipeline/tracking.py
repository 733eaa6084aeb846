"""The metric log of a run with its trackers, and what they get beside the metrics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.errors import DovetailError
from dovetail.pipeline.setup import Setup
from dovetail.run.checkpoint import Progress, random_state, set_random_state
from dovetail.run.distributed import SilentLog
from dovetail.run.graph import try_write_graph
from dovetail.run.report import try_to, write_picture
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
from dovetail.types import RunInfo

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport

_GRAPH_BATCH_SIZE = 4


def open_tracking(setup: Setup, run_dir: Path, progress: Progress, *, is_new: bool) -> Tracking:
    """Open the metric log and make the trackers; on a rank that does not write, neither.

    Args:
        setup: What the run is made of.
        run_dir: The run's folder. A new one is removed if a tracker cannot be made.
        progress: How far the run has come.
        is_new: Whether the run begins now.

    Raises:
        DovetailError: A tracker cannot be made, or the log cannot be written.
    """
    params, settings = setup.config.to_flat_dict(), setup.config.log
    if not setup.ranks.is_first:
        return Tracking(SilentLog(run_dir), {}, {})
    info = RunInfo(setup.config.run.name, run_dir.name, run_dir, params)
    resumed_at = None if is_new else (progress.step, progress.log_bytes)
    chosen = {
        name: TrackerChoice(options, settings.options.get(name.rpartition(":")[2], {}))
        for name, options in setup.checked.options("log").items()
    }
    log = open_log(run_dir, resumed_at, patience_s=settings.flush_s)
    try:
        trackers, sidecar = make_trackers(
            setup.registry,
            info,
            chosen,
            follow=settings.follow,
            config_dir=setup.checked.directory,
            flush_s=settings.flush_s,
            calls_per_s=settings.calls_per_s,
        )
    except DovetailError:
        log.close()
        if is_new:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return Tracking(
        log,
        trackers,
        params,
        sidecar,
        config_dir=setup.checked.directory,
        flush_s=settings.flush_s,
        calls_per_s=settings.calls_per_s,
    )


def track_graph(setup: Setup, tracking: Tracking, run_dir: Path) -> None:
    """Trace the model on one batch, and let the trackers have its graph."""
    state = random_state()  # data may draw at random
    try:
        (batch,) = setup.take_batches(setup.splits.train, (_GRAPH_BATCH_SIZE,))
    finally:
        set_random_state(state)
    batch = {name: value.to(setup.device) for name, value in batch.items()}
    if setup.transform is not None:
        name, module = setup.transform
        batch[name] = module(batch[name])
    if (path := try_write_graph(run_dir, setup.model, batch)) is not None:
        tracking.add_file("graph", "graph", path, 0)


def track_results(
    setup: Setup, tracking: Tracking, run_dir: Path, bundle: BundleReport | None, step: int
) -> None:
    """Let the trackers have what the run has made."""
    picture = try_to(write_picture, run_dir) if setup.config.run.report else None
    if picture is not None:
        tracking.add_file("figure", "report", picture, step)
    if bundle is not None:
        tracking.add_file("artifact", "bundle", bundle.path, step)
