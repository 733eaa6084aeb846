"""The whole job: a config in, a trained model, its metrics and a proven bundle out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dovetail.errors import ConfigError, DovetailError, build_message
from dovetail.preflight import (
    CheckedConfig,
    ConfigSource,
    build_model,
    build_recipe,
    build_splits,
    check_collator,
    check_config,
    check_monitor,
    try_one_batch,
)
from dovetail.registry.lock import check_lock, read_lock
from dovetail.run.agreement import WorkerCheck, check_ranks
from dovetail.run.checkpoint import (
    Progress,
    has_checkpoint,
    last_checkpoint,
    load_progress,
    load_state,
    load_weights,
    random_state,
    seed_everything,
    set_random_state,
)
from dovetail.run.device import build_scaler
from dovetail.run.distributed import ALONE, Ranks, SilentLog, explained_loss, join_ranks
from dovetail.run.fit import FitParts, Loop
from dovetail.run.flops import FlopMeter
from dovetail.run.folder import check_same_run, create_run_folder, find_run, rewrite_config
from dovetail.run.graph import try_write_graph
from dovetail.run.launch import (
    Launch,
    check_notebook,
    check_same_ranks,
    check_strategy,
    choose_rank_device,
)
from dovetail.run.loader import EpochLoader, build_loader, mix_seed, primary_input
from dovetail.run.losses import build_objective, check_additive
from dovetail.run.observer import RunObserver, RunPlan
from dovetail.run.report import try_to, write_picture, write_report
from dovetail.run.samples import take_batches, vary_lengths
from dovetail.run.schedule import LearningRate, build_optimizer, count_steps
from dovetail.run.system import RunCounters, monitor_run
from dovetail.run.tracking import read_metrics
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
from dovetail.run.wrapping import WholeOptimizer, copy_hollow, give_memory, wrap_model
from dovetail.types import Collator, RunInfo

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport
    from dovetail.registry import Registry

PROOF_BATCH_SIZES = (1, 2, 3, 8)
"""Batch sizes at which every artifact is compared with the trained model."""

EXAMPLE_BATCH_SIZE = 4
"""Batch size of the export itself; none of the sizes of the proof."""

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


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    status: str
    """"completed", "stopped early" or "interrupted"."""
    run_dir: Path
    final_metrics: Mapping[str, float]
    best_metrics: Mapping[str, float]
    """Metrics of the best checkpoint."""
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    num_steps: int
    duration_s: float
    model: nn.Module
    """The model with the weights of the best checkpoint."""
    bundle: BundleReport | None = None
    """What was exported; `None` where nothing was to be."""
    report: Path | None = None
    """Page with the run's curves; `None` without `run.report`, or without matplotlib."""
    parked_trackers: Mapping[str, str] = field(default_factory=dict)
    """Trackers that lack records, and why; `dovetail log sync` hands them over later."""

    @property
    def metrics_path(self) -> Path:
        """The metric log."""
        return self.run_dir / "metrics.jsonl"

    @property
    def metrics(self) -> Any:
        """All metrics as a table; see `dovetail.read_metrics`."""
        return read_metrics(self.run_dir)


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
        self._checked = checked
        self._config = checked.config
        self._registry = checked.registry
        self._observer = observer
        self._lock = checked.lock()
        self._ranks = ranks
        check_ranks(self._lock)
        self._launch = Launch(ranks)
        with ranks.together():
            self._make_parts(model, data)

    def _make_parts(self, model: nn.Module | None, data: Any) -> None:
        """Make what each rank makes for itself, alike."""
        checked = self._checked
        check_strategy(self._config, self._ranks)
        self._device = choose_rank_device(self._config.train.device, self._ranks)
        self._recipe = None if model is not None else build_recipe(checked)
        seed_everything(self._config.run.seed)
        if self._config.run.deterministic:  # never off: it may be the caller's own wish
            torch.use_deterministic_algorithms(True)
        self._model = build_model(checked, model).to(self._device)
        self._splits = build_splits(checked, data)
        self._collator = None if self._splits.has_own_loaders else self._build_collator()
        self._transform = self._find_transform()
        self._hollow: nn.Module | None = None
        self._meter = FlopMeter()
        self._exporters = {
            name: self._registry.export(name, self._config.task, options)
            for name, options in checked.options("export").items()
        }
        if self._ranks.rank:  # what is drawn from now on differs: dropout, augmentation
            seed_everything(mix_seed(self._config.run.seed, self._ranks.rank))

    def run(self, resume: str | Path | None = None) -> TrainingResult:
        """Do the job; see `train`."""
        start_s = time.perf_counter()
        ranks = self._ranks
        resumed_dir, checkpoint, progress = ranks.lead(lambda: self._find_start(resume))
        parts, plan = self._prepare(progress, checkpoint)
        run_dir = ranks.lead(lambda: self._open_folder(resumed_dir))
        with ranks.together():
            tracking = self._open_tracking(run_dir, progress, is_new=resumed_dir is None)
        with tracking:
            if checkpoint is not None:
                with ranks.together():
                    load_state(checkpoint, parts.saved, ranks=ranks)
                    if ranks.is_first:
                        rewrite_config(run_dir, self._config)
            elif ranks.is_first and self._hollow is None and self._config.log.graph:
                self._draw_graph(tracking, run_dir)
            self._observer.on_start(plan, run_dir)
            loop = Loop(parts, tracking.log, run_dir / "checkpoints", progress, self._device)
            with monitor_run(
                tracking.log.write, parts.counters, self._config, self._device, self._meter.count
            ):
                fitted = loop.run()
            if self._hollow is not None:
                self._model = give_memory(self._hollow, self._device)
            if fitted.best_checkpoint is not None:
                load_weights(fitted.best_checkpoint, self._model)
            ranks.leave()  # nobody waits for the export
            bundle = None
            if ranks.is_first and self._exporters and fitted.status != "interrupted":
                bundle = self._export(_bundle_path(run_dir, fitted.progress.step))
            if ranks.is_first:
                self._hand_over(tracking, run_dir, bundle, fitted.progress.step)
            tracking.status = fitted.status
        writes_report = ranks.is_first and self._config.run.report
        report = try_to(write_report, run_dir) if writes_report else None
        return TrainingResult(
            status=fitted.status,
            run_dir=run_dir,
            final_metrics=fitted.metrics,
            best_metrics=fitted.best_metrics or fitted.metrics,
            best_checkpoint=fitted.best_checkpoint,
            last_checkpoint=fitted.last_checkpoint,
            num_steps=fitted.progress.step,
            duration_s=time.perf_counter() - start_s,
            model=self._model,
            bundle=bundle,
            report=report,
            parked_trackers=tracking.parked,
        )

    def _draw_graph(self, tracking: Tracking, run_dir: Path) -> None:
        name = primary_input(self._config.task)
        state = random_state()  # data may draw at random
        try:
            sizes = (EXAMPLE_BATCH_SIZE,)
            (batch,) = take_batches(self._splits.train, self._collator, name, sizes)
        finally:
            set_random_state(state)
        batch = {k: v.to(self._device) for k, v in batch.items()}
        if self._transform is not None:
            batch[name] = self._transform[1](batch[name])
        if (path := try_write_graph(run_dir, self._model, batch)) is not None:
            tracking.add_file("graph", "graph", path, 0)

    def _hand_over(
        self, tracking: Tracking, run_dir: Path, bundle: BundleReport | None, step: int
    ) -> None:
        """Let the trackers have what the run has made."""
        picture = try_to(write_picture, run_dir) if self._config.run.report else None
        if picture is not None:
            tracking.add_file("figure", "report", picture, step)
        if bundle is not None:
            tracking.add_file("artifact", "bundle", bundle.path, step)

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
        if is_trained and (not self._exporters or (run_dir / "bundle").exists()):
            found = f"run {str(run_dir)!r} has done all its {progress.epoch} epochs"
            hint = "Raise it to train on."
            raise ConfigError(build_message("config train.epochs", found, action=hint))
        return run_dir, checkpoint, progress

    def _open_folder(self, resumed_dir: Path | None) -> Path:
        run_dir = resumed_dir or create_run_folder(self._config, self._lock)
        self._launch.note(run_dir)
        return run_dir

    def _prepare(self, progress: Progress, checkpoint: Path | None) -> tuple[FitParts, RunPlan]:
        """Make everything the loop works with, and try it on one batch."""
        config, train, ranks = self._config, self._config.train, self._ranks
        train_loader = self._build_loader(self._splits.train, is_training=True)
        validation_loader = None
        if self._splits.validation is not None:
            validation_loader = self._build_loader(self._splits.validation, is_training=False)
        with ranks.together():
            objective = build_objective(config.task, train.loss, self._checked.directory)
            meter = self._meter if config.log.system_s else None
            names = try_one_batch(
                self._model, train_loader, config.task, objective, self._transform, meter
            )
            check_monitor(train, names, has_validation=validation_loader is not None)
        num_parameters = sum(p.numel() for p in self._model.parameters())
        model = self._wrap_model(checkpoint)
        with ranks.together():
            optimizer = build_optimizer(model, train, self._checked.directory)
            scaler = build_scaler(train, self._device)
            ((name, options),) = self._checked.options("accumulate").items()
            accumulator = self._registry.accumulate(name, model, optimizer, scaler, options)
            check_additive(objective, accumulator)
            total_steps = count_steps(train, train_loader.num_batches, accumulator, ranks.size)
            learning_rate = LearningRate(optimizer, train, total_steps)
        parts = FitParts(
            model=model,
            train_loader=train_loader,
            validation_loader=validation_loader,
            objective=objective,
            accumulator=accumulator,
            learning_rate=learning_rate,
            config=train,
            saved={
                "optimizer": optimizer if self._hollow is None else WholeOptimizer(optimizer),
                "scaler": scaler,
                "accumulator": accumulator,
            },
            transform=self._transform,
            observer=self._observer,
            counters=RunCounters(primary_input(config.task)),
            ranks=ranks,
        )
        plan = RunPlan(
            name=config.run.name,
            device=ranks.describe(self._device),
            num_parameters=num_parameters,
            num_epochs=train.epochs,
            batches_per_epoch=train_loader.num_batches,
            total_steps=total_steps,
            first_epoch=progress.epoch,
        )
        return parts, plan

    def _wrap_model(self, checkpoint: Path | None) -> nn.Module:
        """Load, compile and wrap the model, in this order."""
        model, section, ranks = self._model, self._config.distributed, self._ranks
        with ranks.together():
            if checkpoint is not None and ranks.is_first:  # the others get them from it
                load_weights(checkpoint, model)
            if ranks.size > 1 and section.strategy == "fsdp":
                self._hollow = copy_hollow(model)
            for name, options in self._checked.options("compile").items():
                model = self._registry.compile(name, model, self._config.task, options)
        return wrap_model(model, section, ranks, self._device)

    def _open_tracking(self, run_dir: Path, progress: Progress, *, is_new: bool) -> Tracking:
        params, settings = self._config.to_flat_dict(), self._config.log
        if not self._ranks.is_first:
            return Tracking(SilentLog(run_dir), {}, {})
        info = RunInfo(self._config.run.name, run_dir.name, run_dir, params)
        resumed_at = None if is_new else (progress.step, progress.log_bytes)
        chosen = {
            name: TrackerChoice(options, settings.options.get(name.rpartition(":")[2], {}))
            for name, options in self._checked.options("log").items()
        }
        log = open_log(run_dir, resumed_at, patience_s=settings.flush_s)
        try:
            trackers, sidecar = make_trackers(
                self._registry,
                info,
                chosen,
                follow=settings.follow,
                config_dir=self._checked.directory,
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
            config_dir=self._checked.directory,
            flush_s=settings.flush_s,
            calls_per_s=settings.calls_per_s,
        )

    def _build_collator(self) -> Collator:
        if self._checked.collator_error is not None:
            raise self._checked.collator_error
        ((name, options),) = self._checked.options("collate").items()
        collator = self._registry.collate(name, self._config.task, options)
        where = self._registry.load("collate", name).info.where
        check_collator(collator, self._config.data.num_workers, where)
        return collator

    def _find_transform(self) -> tuple[str, nn.Module] | None:
        module = getattr(self._collator, "device_transform", None)
        if not isinstance(module, nn.Module):
            return None
        return primary_input(self._config.task), module.to(self._device).eval()

    def _build_loader(self, split: Any, *, is_training: bool) -> EpochLoader:
        names = [] if self._collator is None else self._checked.options("collate")
        checks = [WorkerCheck.of(self._registry.load("collate", n).info, self._lock) for n in names]
        return build_loader(
            split,
            self._config,
            self._collator,
            self._device,
            is_training=is_training,
            worker_check=next(iter(checks), None),
            ranks=self._ranks,
        )

    def _export(self, destination: Path) -> BundleReport:
        from dovetail.bundle import build_bundle

        split = self._splits.train if self._splits.validation is None else self._splits.validation
        sizes = (EXAMPLE_BATCH_SIZE, *PROOF_BATCH_SIZES)
        name = primary_input(self._config.task)
        batches = take_batches(split, self._collator, name, sizes)
        if self._config.task.modality == "text":
            batches = vary_lengths(batches, name)
        example, *golden = batches
        return build_bundle(
            self._model,
            self._config.task,
            self._exporters,
            destination,
            example=example,
            golden=golden,
            transform=None if self._transform is None else self._transform[1],
            recipe=self._recipe,
            training_config=self._config.to_dict(),
            options={
                name: options.model_dump(mode="json")
                for name, options in self._checked.options("export").items()
            },
            progress=self._observer.on_export,
        )


def _bundle_path(run_dir: Path, step: int) -> Path:
    """Return where the bundle goes; a run that was trained on keeps its earlier one."""
    path = run_dir / "bundle"
    return path.with_name(f"bundle-step-{step:06d}") if path.exists() else path
