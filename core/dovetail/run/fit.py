"""The loop: batches in, optimizer steps and records out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from dovetail.config import TrainConfig
from dovetail.errors import CheckpointError, DataError, build_message
from dovetail.run.best import Best
from dovetail.run.checkpoint import Progress, prune, save_checkpoint
from dovetail.run.device import build_autocast
from dovetail.run.distributed import ALONE, Ranks
from dovetail.run.evaluate import evaluate
from dovetail.run.feed import BatchFeed
from dovetail.run.interrupt import Interrupt
from dovetail.run.loader import EpochLoader
from dovetail.run.losses import Objective
from dovetail.run.naming import Batch
from dovetail.run.observer import RunObserver
from dovetail.run.schedule import LearningRate
from dovetail.run.shards import Filler
from dovetail.run.skips import SkipWatch
from dovetail.run.system import RunCounters
from dovetail.run.tracking import MetricLog
from dovetail.run.tracking.recording import Recorder, muted
from dovetail.run.wrapping import list_buffers, share_tensors
from dovetail.signature import build_call
from dovetail.types import Accumulator

NOT_MUTED = nullcontext()

Status: TypeAlias = Literal["completed", "stopped early", "interrupted"]


@dataclass
class FitParts:
    """Everything the loop works with, made before it starts."""

    model: nn.Module
    train_loader: EpochLoader
    validation_loader: EpochLoader | None
    objective: Objective
    accumulator: Accumulator
    learning_rate: LearningRate
    config: TrainConfig
    saved: Mapping[str, Any]
    """Parts with a `state_dict` that a checkpoint keeps."""
    transform: tuple[str, nn.Module] | None = None
    """Name of the input that is preprocessed on the device, and what does it."""
    observer: RunObserver = field(default_factory=RunObserver)
    counters: RunCounters = field(default_factory=RunCounters)
    """Where the loop counts what it does."""
    ranks: Ranks = ALONE
    """Who trains the model together; each has parts of its own."""


@dataclass(frozen=True)
class FitResult:
    """How the loop ended."""

    status: Status
    progress: Progress
    metrics: dict[str, float]
    """The last value of every metric."""
    best_metrics: dict[str, float]
    """The metrics of the evaluation whose checkpoint is best."""
    best_checkpoint: Path | None
    last_checkpoint: Path | None


class Loop:
    """Trains a model, from wherever `progress` stands.

    Args:
        parts: What it works with.
        log: Where the records go.
        checkpoint_dir: Where the checkpoints go.
        progress: Where to begin; a fresh one, or a checkpoint's.
        device: Where batches and model are.
    """

    def __init__(
        self,
        parts: FitParts,
        log: MetricLog,
        checkpoint_dir: Path,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self._parts = parts
        self._log = log
        self._checkpoint_dir = checkpoint_dir
        self._config = parts.config
        self._step = progress.step
        self._epoch = progress.epoch
        self._micro_batch = progress.micro_batch
        self._micro_step = progress.micro_step
        self._items = progress.items
        self._num_bad = progress.num_bad_evaluations
        self._skips = SkipWatch(parts.config.max_skipped_windows)
        self._recorder = Recorder(log, self._position)
        self._feed = BatchFeed(parts.train_loader, self._recorder.train)
        self._metrics = dict(progress.metrics)
        self._best = Best(parts.config.monitor_mode, progress)
        self._has_warned_unsaved = False
        self._last_checkpoint: Path | None = None
        self._saved_at: tuple[int, int] | None = None
        self._autocast = build_autocast(self._config, device)
        self._call: Callable[[Batch], Any] | None = None
        self._ranks = parts.ranks
        self._buffers = list_buffers(parts.model) if self._ranks.size > 1 else []
        self._counters = parts.counters
        self._counters.step, self._counters.items = self._step, self._items

    def run(self) -> FitResult:
        """Train to the end, an early stop or an interrupt.

        Raises:
            NonFiniteLossError: Too many windows in a row were skipped.
            DataError: A batch or its labels do not fit.
            ModelError: The model does not take the batch or its output does not fit the loss.
            CheckpointError: The last checkpoint cannot be written.
        """
        self._parts.learning_rate.set_for(self._step)
        status: Status = "completed"
        with Interrupt() as interrupt, self._recorder:
            while self._epoch < self._config.epochs and not self._has_all_steps():
                is_whole = self._train_epoch(interrupt)
                self._recorder.phase = None
                if self._is_over(interrupt):
                    break
                is_best, is_enough = self._end_epoch(interrupt)
                # An interrupted evaluation is done again when the run is resumed.
                if self._is_over(interrupt):
                    break
                if is_whole:
                    self._epoch, self._micro_batch = self._epoch + 1, 0
                self._save(is_best=is_best)
                if is_enough:
                    status = "stopped early"
                    break
            if self._is_over(interrupt):
                status = "interrupted"
            if self._saved_at != (self._epoch, self._micro_batch):
                self._save(is_best=False, is_last=True)
        return FitResult(
            status,
            self.progress,
            self._metrics,
            self._best.metrics,
            self._best.find(self._checkpoint_dir, self._last_checkpoint),
            self._last_checkpoint,
        )

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return Progress(
            step=self._step,
            epoch=self._epoch,
            micro_batch=self._micro_batch,
            micro_step=self._micro_step,
            items=self._items,
            best_value=self._best.value,
            best_step=self._best.step,
            num_bad_evaluations=self._num_bad,
            log_bytes=self._log.tell(),
            metrics=dict(self._metrics),
            best_metrics=dict(self._best.metrics),
            num_ranks=self._ranks.size,
        )

    def _is_over(self, interrupt: Interrupt) -> bool:
        """Return whether a rank was interrupted; all ranks ask at the same moments."""
        is_over = self._ranks.any(interrupt.is_set)
        if is_over:  # never back: a signal may come at any moment
            interrupt.is_set = True
        return is_over

    def _position(self) -> dict[str, int]:
        return {"step": self._step, "epoch": self._epoch, "micro_step": self._micro_step}

    def _has_all_steps(self) -> bool:
        limit = self._config.max_steps
        return limit is not None and self._step >= limit

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """Train to the end of the epoch or of the run; return whether the epoch is done."""
        parts = self._parts
        accumulator, objective, transform = parts.accumulator, parts.objective, parts.transform
        accumulate, micro_batch = accumulator.accumulate, accumulator.micro_batch
        compute_loss, model, autocast = objective.loss, parts.model, self._autocast
        model.train()
        call: Callable[[Batch], Any] | None = None
        batches = self._counters.watch(self._feed.epoch(self._epoch, self._micro_batch))
        self._recorder.phase = logged = self._recorder.train
        for batch, is_final in batches:
            if transform is not None:
                name, module = transform
                batch[name] = module(batch[name])
            if call is None:
                call = self._bind(batch)
            is_filler = type(batch) is Filler
            with muted() if is_filler else NOT_MUTED, micro_batch(is_final):
                if autocast is None:
                    loss, items = compute_loss(call(batch), batch)
                else:
                    with autocast():
                        loss, items = compute_loss(call(batch), batch)
                has_stepped = accumulate(loss, model, 0 if is_filler else items, is_final)
            if logged.pending:
                logged.fold(items)
            self._micro_batch += self._ranks.size
            self._micro_step += 1
            if not accumulator.is_window_open:
                self._close_window(has_stepped)
                if self._is_over(interrupt) or self._has_all_steps():
                    return is_final
        if not self._micro_batch:
            hint = "Check the data factory."
            raise DataError(build_message("data split 'train'", "gave no batch", action=hint))
        if accumulator.is_window_open:  # a loader that gives less than its length
            self._close_window(accumulator.flush(model))
        return True

    def _bind(self, batch: Batch) -> Callable[[Batch], Any]:
        """Return what calls the model with batches like this one."""
        if self._call is None:
            needs_labels = self._parts.objective.needs_labels_in_model
            self._call = build_call(self._parts.model, list(batch), needs_labels=needs_labels)
        return self._call

    def _close_window(self, has_stepped: bool) -> None:
        recorder, window = self._recorder, self._parts.accumulator.last_window
        # What is saved, and what the next window begins with, is alike on all ranks.
        share_tensors(self._buffers)
        if window is None or not has_stepped:
            recorder.train.drop()  # a window without a step counts nowhere
            # One without a single item has nothing to learn from and nothing wrong.
            if window is not None and window.is_skipped:
                values = {"loss": window.loss, "grad_norm": window.grad_norm}
                recorder.write("skip", **values, wait_s=self._feed.take_wait_s())
                self._skips.note(window, self._step)
            return
        self._skips.reset()
        self._step += 1
        self._items += int(window.items)
        self._counters.step, self._counters.items = self._step, self._items
        metrics: dict[str, float] = {
            "train/loss": window.loss,
            "train/lr": self._parts.learning_rate.value,
        }
        if window.grad_norm is not None:
            metrics["train/grad_norm"] = window.grad_norm
        metrics.update(recorder.train.close())
        wait_s = self._feed.take_wait_s()
        recorder.write("step", items=window.items, wait_s=wait_s, metrics=metrics)
        self._metrics.update(metrics)
        metrics["train/items"] = window.items  # an axis in the log, a number for the observer
        recorder.phase = None
        self._parts.observer.on_step(self._epoch, self._micro_batch, self._step, metrics)
        self._parts.learning_rate.set_for(self._step)
        every = self._config.checkpoint_steps
        if every is not None and self._step % every == 0:
            self._save(is_best=False)
        recorder.phase = recorder.train

    def _end_epoch(self, interrupt: Interrupt) -> tuple[bool, bool]:
        """Evaluate; return whether the model is the best so far, and whether to stop early."""
        metrics = self._evaluate(interrupt)
        if self._is_over(interrupt):
            return False, False
        self._metrics.update(metrics)
        # A run without a validation split has no such metric: its last model is its best.
        value = self._metrics.get(self._config.monitor)
        is_best = self._best.offer(value, self._step, self._metrics)
        if is_best:
            self._num_bad = 0
        elif value is not None:
            self._num_bad += 1
        patience = self._config.patience
        if patience is None or self._num_bad < patience:
            return is_best, False
        name = self._config.monitor
        text = f"stopped early: {name} was no better for {self._num_bad} evaluations"
        self._parts.observer.on_message(text)
        return is_best, True

    def _evaluate(self, interrupt: Interrupt) -> dict[str, float]:
        loader = self._parts.validation_loader
        if loader is None:
            return {}
        recorder = self._recorder
        with recorder.evaluating() as logged:
            values = evaluate(
                self._parts.model,
                self._bind,
                loader,
                self._parts.objective,
                transform=self._parts.transform,
                autocast=self._autocast,
                should_stop=lambda: self._is_over(interrupt),
                on_batch=recorder.fold_evaluation,
                ranks=self._ranks,
            )
            if values is None:
                return {}
            metrics = {f"val/{name}": value for name, value in values.items()} | logged.close()
            # What a rank has logged for itself may decide when to stop: all must stop together.
            metrics = self._ranks.first(metrics)
        recorder.write("evaluation", metrics=metrics)
        self._parts.observer.on_evaluation(self._epoch, self._step, metrics)
        return metrics

    def _save(self, *, is_best: bool, is_last: bool = False) -> None:
        parts, ranks = self._parts, self._ranks
        try:
            path = save_checkpoint(
                self._checkpoint_dir, parts.model, parts.saved, self.progress, ranks=ranks
            )
        except CheckpointError as err:
            if is_last:
                raise
            if is_best:
                self._best.take_back()
            self._warn_unsaved(err)
            return
        self._last_checkpoint = path
        self._saved_at = (self._epoch, self._micro_batch)
        best = self._best.find(self._checkpoint_dir, path)
        if ranks.is_first:
            prune(self._checkpoint_dir, {path} | ({best} if best else set()))
        self._parts.observer.on_checkpoint(path, is_best)

    def _warn_unsaved(self, err: CheckpointError) -> None:
        if not self._has_warned_unsaved and self._ranks.is_first:
            self._has_warned_unsaved = True
            text = f"{err} The run goes on, and tries again at its next checkpoint."
            warnings.warn(text, stacklevel=4)
