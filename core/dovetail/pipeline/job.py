"""One run, from its config to its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dovetail.errors import ConfigError, build_message
from dovetail.pipeline.assembly import assemble
from dovetail.pipeline.export import choose_destination, export_model
from dovetail.pipeline.result import TrainingResult
from dovetail.pipeline.setup import Setup
from dovetail.pipeline.tracking import open_tracking, track_graph, track_results
from dovetail.preflight import CheckedConfig, ConfigSource, check_config
from dovetail.registry.lock import check_lock, read_lock
from dovetail.run.agreement import check_ranks
from dovetail.run.checkpoint import (
    Progress,
    has_checkpoint,
    last_checkpoint,
    load_progress,
    load_state,
    load_weights,
)
from dovetail.run.distributed import ALONE, Ranks, explained_loss, join_ranks
from dovetail.run.fit import FitResult, Loop
from dovetail.run.folder import check_same_run, create_run_folder, find_run, rewrite_config
from dovetail.run.launch import Launch, check_notebook, check_same_ranks
from dovetail.run.observer import RunObserver
from dovetail.run.report import try_to, write_report
from dovetail.run.system import monitor_run
from dovetail.run.wrapping import give_memory

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport
    from dovetail.pipeline.assembly import Assembly
    from dovetail.registry import Registry
    from dovetail.run.tracking.session import Tracking

_FIXED_ON_RESUME = (
    "run.seed",
    "model.",
    "data.factory",
    "data.kwargs",
    "data.shuffle",
    "task.",
    "train.batch_size",
    "train.optimizer",
    "train.precision",
    "collate.",
    "accumulate.",
)


def train(
    config: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    model: nn.Module | None = None,
    data: Any = None,
    resume: str | Path | None = None,
    frozen: str | Path | None = None,
    registry: Registry | None = None,
    observer: RunObserver | None = None,
) -> TrainingResult:
    """Train a model as a config says, and export it.

    Where a launcher such as torchrun has started several processes, each calls this, and rank 0
    alone writes, reports and exports.

    Args:
        config: A TOML or JSON file, plain tables, or a `TrainingConfig`.
        overrides: Settings such as `train.lr=3e-4`, applied on top.
        model: A model, in place of `[model] factory`.
        data: Splits, in place of `[data] factory`: a mapping with "train" and "validation", a pair,
            or one data set; each a data set or a `DataLoader` of your own.
        resume: Folder of a run to go on with, or "latest".
        frozen: A `plugins.lock.json`, or a run's folder: run with exactly these plugins.
        registry: Where backends come from; the process's own without it.
        observer: Hears of the run's progress, on rank 0.

    Returns:
        Metrics, paths, the trained model and the bundle's report.

    Raises:
        ConfigError: Something in the config or the arguments does not fit. Nothing was written.
        LockError: The plugins are not those of `frozen`.
        DataError: Data or labels do not fit.
        ModelError: The model does not take the data, or its output does not fit the loss.
        RunError: The run cannot start or go on.
        ExportError: No format could be exported; the checkpoints are there.
    """
    ranks = join_ranks()
    with ranks.together():
        checked = check_config(config, overrides, registry=registry)
        if frozen is not None:
            expected = read_lock(Path(frozen))
            check_lock(expected, checked.lock(), f"lock {str(frozen)!r}")
        check_notebook(checked.config)
    if not ranks.is_first:
        observer = None
    with explained_loss(ranks):
        return Job(checked, model, data, observer or RunObserver(), ranks).run(resume)


class Job:
    """One run, from checked config to result.

    Args:
        checked: The config with its backends.
        model: A model in place of the config's factory.
        data: Splits in place of the config's factory.
        observer: Hears of the progress.
        ranks: Who does the job together.
    """

    def __init__(
        self,
        checked: CheckedConfig,
        model: nn.Module | None,
        data: Any,
        observer: RunObserver,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config = checked.config
        self._observer = observer
        self._lock = checked.lock()
        self._ranks = ranks
        check_ranks(self._lock)
        self._launch = Launch(ranks)
        with ranks.together():
            self._setup = Setup(checked, model, data, ranks)

    def run(self, resume: str | Path | None = None) -> TrainingResult:
        """Do the job; see `train`."""
        start_s = time.perf_counter()
        ranks, setup = self._ranks, self._setup
        resumed_dir, checkpoint, progress = ranks.lead(lambda: self._find_start(resume))
        assembly = assemble(setup, self._observer, progress, checkpoint)
        run_dir = ranks.lead(lambda: self._open_folder(resumed_dir))
        with ranks.together():
            tracking = open_tracking(setup, run_dir, progress, is_new=resumed_dir is None)
        with tracking:
            if checkpoint is not None:
                with ranks.together():
                    load_state(checkpoint, assembly.parts.saved, ranks=ranks)
                    if ranks.is_first:
                        rewrite_config(run_dir, self._config)
            elif ranks.is_first and assembly.hollow is None and self._config.log.graph:
                track_graph(setup, tracking, run_dir)
            self._observer.on_start(assembly.plan, run_dir)
            fitted = self._fit(assembly, tracking, run_dir, progress)
            model = setup.model
            if assembly.hollow is not None:
                model = give_memory(assembly.hollow, setup.device)
            if fitted.best_checkpoint is not None:
                load_weights(fitted.best_checkpoint, model)
            ranks.leave()  # nobody waits for the export
            bundle = self._finish(fitted, model, tracking, run_dir) if ranks.is_first else None
            tracking.status = fitted.status
        writes_report = ranks.is_first and self._config.run.report
        return TrainingResult(
            status=fitted.status,
            run_dir=run_dir,
            final_metrics=fitted.metrics,
            best_metrics=fitted.best_metrics or fitted.metrics,
            best_checkpoint=fitted.best_checkpoint,
            last_checkpoint=fitted.last_checkpoint,
            num_steps=fitted.progress.step,
            model=model,
            bundle=bundle,
            report=try_to(write_report, run_dir) if writes_report else None,
            parked_trackers=tracking.parked,
            duration_s=time.perf_counter() - start_s,
        )

    def _find_start(self, resume: str | Path | None) -> tuple[Path | None, Path | None, Progress]:
        """Return folder, checkpoint and progress to go on with, as far as there are any."""
        earlier = self._launch.find_earlier(self._config.run)
        if earlier is None and resume is None:
            return None, None, Progress()
        if earlier is not None and not has_checkpoint(earlier):
            return earlier, None, Progress()
        run_dir = earlier or find_run(self._config.run, resume or "latest")
        check_same_run(self._config, self._lock, run_dir, _FIXED_ON_RESUME)
        checkpoint = last_checkpoint(run_dir)
        progress = load_progress(checkpoint)
        check_same_ranks(progress, self._config, self._ranks)
        is_trained = progress.epoch >= self._config.train.epochs
        if is_trained and (not self._setup.exporters or (run_dir / "bundle").exists()):
            found = f"run {str(run_dir)!r} has done all its {progress.epoch} epochs"
            hint = "Raise it to train on."
            raise ConfigError(build_message("config train.epochs", found, action=hint))
        return run_dir, checkpoint, progress

    def _open_folder(self, resumed_dir: Path | None) -> Path:
        run_dir = resumed_dir or create_run_folder(self._config, self._lock)
        self._launch.note(run_dir)
        return run_dir

    def _fit(
        self, assembly: Assembly, tracking: Tracking, run_dir: Path, progress: Progress
    ) -> FitResult:
        setup, write = self._setup, tracking.log.write
        checkpoints = run_dir / "checkpoints"
        loop = Loop(assembly.parts, tracking.log, checkpoints, progress, setup.device)
        if not self._ranks.is_first:
            return loop.run()
        counters, flops = assembly.parts.counters, setup.meter.count
        with monitor_run(write, counters, self._config, setup.device, flops):
            return loop.run()

    def _finish(
        self, fitted: FitResult, model: nn.Module, tracking: Tracking, run_dir: Path
    ) -> BundleReport | None:
        """Export the model, and let the trackers have what there is to see."""
        setup, step, bundle = self._setup, fitted.progress.step, None
        if setup.exporters and fitted.status != "interrupted":
            destination = choose_destination(run_dir, step)
            bundle = export_model(setup, model, destination, self._observer.on_export)
        track_results(setup, tracking, run_dir, bundle, step)
        return bundle
