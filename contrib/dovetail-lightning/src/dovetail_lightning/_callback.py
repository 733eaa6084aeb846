"""`MetricLogCallback`: the folder of a run, its metric log and the trackers that follow it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from dovetail import RunInfo
from dovetail.errors import ConfigError, DovetailError, build_message
from dovetail.run.distributed import Ranks, SilentLog, join_ranks
from dovetail.run.flops import count_elements
from dovetail.run.folder import create_run_folder
from dovetail.run.loader import primary_input
from dovetail.run.report import try_to, write_report
from dovetail.run.system import RunCounters, monitor_run
from dovetail.run.tracking.recording import Recorder
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
from dovetail_lightning._module import DovetailModule


class MetricLogCallback(Callback):
    """Writes the run's folder with its metric log, and feeds the trackers of `[log]`.

    The records are those of `dovetail train`: one per optimizer step, with the mean loss over the
    items of its window, one per evaluation, one at the end. `dovetail runs`, `report`, `compare`
    and `dovetail log sync` read them. What model, loss and data log with `dovetail.log_metric`
    stands in them too. With several ranks, rank 0 alone writes.

    A run that goes on from a checkpoint of Lightning's (`trainer.fit(module, ckpt_path=...)`) goes
    on in its folder, with the log as it was at the checkpoint.
    """

    def __init__(self) -> None:
        self.run_dir: Path | None = None
        """The run's folder, once training has begun."""
        self._resumed: dict[str, Any] = {}
        self._run: _Run | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that has no config.

        Raises:
            ConfigError: It is none of dovetail's.
        """
        if not isinstance(pl_module, DovetailModule):
            found = f"got a {type(pl_module).__name__}, which has no config"
            hint = "Log from other modules with dovetail.MetricsTracker."
            raise ConfigError(build_message("MetricLogCallback", found, "a DovetailModule", hint))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the run's folder.

        Raises:
            RunError: It exists already, or cannot be written.
            PluginError: A tracker cannot be made.
        """
        ranks = join_ranks()
        checked, state, self._resumed = pl_module.checked, self._resumed, {}
        self.run_dir = Path(state["run_dir"]) if state else None
        if self.run_dir is None or not ranks.lead(self.run_dir.is_dir):
            state = {}
            self.run_dir = ranks.lead(lambda: create_run_folder(checked.config, checked.lock()))
        with ranks.together():  # a tracker that cannot be made is rank 0's alone
            self._run = _Run(trainer, pl_module, self.run_dir, state, ranks)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to wait for the first batch."""
        if self._run is not None:
            self._run.wait()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch that came."""
        if self._run is not None:
            self._run.begin(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Note the learning rate of the step, before the schedule goes on."""
        if self._run is not None:
            self._run.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the record of a window that is closed."""
        if self._run is not None:
            self._run.end(outputs["items"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take what is logged as the evaluation's."""
        if self._run is not None:
            self._run.recorder.phase = self._run.recorder.evaluation

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what a batch logged with its items."""
        if self._run is not None and outputs["names"]:
            self._run.recorder.fold_evaluation(outputs["names"], outputs["items"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the record of an evaluation."""
        if self._run is not None:
            self._run.evaluate()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the end of the run, and let the trackers finish."""
        self._close("stopped early" if trainer.should_stop else "completed")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write how the run failed, or that it was interrupted."""
        self._close("failed", exception)

    def state_dict(self) -> dict[str, Any]:
        """Return where the log stands."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the folder of the checkpoint's run, if it is there."""
        self._resumed = state_dict

    def _close(self, status: str, error: BaseException | None = None) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close(status, error)


class _Run:
    """One run that is under way, on one rank."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: DovetailModule,
        run_dir: Path,
        state: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.module = module
        self._trainer = trainer
        self._ranks = ranks
        self._micro_step = int(state.get("micro_step", 0))
        self._wait_s = 0.0
        self._waiting_since_s: float | None = None
        self._metrics: dict[str, float] = {}
        self.learning_rate = 0.0
        resumed_at = (int(state["step"]), int(state["log_bytes"])) if state else None
        self.tracking = _open_tracking(module, run_dir, resumed_at, ranks)
        self.recorder = Recorder(self.tracking.log, self._position)
        self.counters = RunCounters(primary_input(module.config.task), module.num_steps)
        self.counters.items = float(state.get("items", 0))
        device = trainer.strategy.root_device
        write, flops = self.tracking.log.write, module.meter.count
        self._monitor = ExitStack()
        self.tracking.__enter__()
        self._monitor.enter_context(self.recorder)
        if ranks.is_first:
            self._monitor.enter_context(
                monitor_run(write, self.counters, module.config, device, flops)
            )
        self.wait()

    def _position(self) -> dict[str, int]:
        return {
            "step": self.module.num_steps,
            "epoch": self._trainer.current_epoch,
            "micro_step": self._micro_step,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return where the log stands."""
        return {
            "run_dir": str(self.tracking.log.path.parent),
            "step": self.module.num_steps,
            "micro_step": self._micro_step,
            "items": self.counters.items,
            "log_bytes": self.tracking.log.tell(),
        }

    def wait(self) -> None:
        """Begin to wait for a batch."""
        self._waiting_since_s = self.counters.waiting_since_s = perf_counter()
        self.recorder.phase = self.recorder.train

    def begin(self, batch: Any) -> None:
        """Count a batch that came."""
        if self._waiting_since_s is not None:
            waited_s = perf_counter() - self._waiting_since_s
            self._wait_s += waited_s
            self.counters.wait_s += waited_s
        self._waiting_since_s = self.counters.waiting_since_s = None
        self.counters.micro_steps += 1
        if isinstance(batch, dict):
            self.counters.num_elements += count_elements(batch, self.counters.input_name)

    def end(self, items: Any) -> None:
        """Write the record of a window that the micro-batch has closed."""
        recorder, window = self.recorder, self.module.last_window
        recorder.train.fold(items)
        self._micro_step += 1
        if window is not None and (window.is_skipped or not window.items):
            recorder.train.drop()  # a window without a step counts nowhere
            if window.is_skipped:
                self._write("skip", loss=window.loss, grad_norm=window.grad_norm)
        elif window is not None:
            self._write_step(window.loss, window.items, window.grad_norm)
        self.wait()

    def _write_step(self, loss: float, items: float, grad_norm: float | None) -> None:
        self.counters.step = self.module.num_steps
        self.counters.items += items
        metrics = {"train/loss": loss, "train/lr": self.learning_rate}
        if grad_norm is not None:
            metrics["train/grad_norm"] = grad_norm
        metrics.update(self.recorder.train.close())
        self._metrics.update(metrics)
        self._write("step", items=items, metrics=metrics)

    def _write(self, kind: str, **fields: Any) -> None:
        self.recorder.write(kind, wait_s=self._wait_s, **fields)
        self._wait_s = 0.0

    def evaluate(self) -> None:
        """Write the record of an evaluation."""
        metrics = self.module.last_evaluation | self.recorder.evaluation.close()
        self.recorder.phase = None
        if metrics:
            self._metrics.update(metrics)
            self.recorder.write("evaluation", metrics=metrics)
        self.wait()

    def close(self, status: str, error: BaseException | None) -> None:
        """Write the end record, and give the trackers their time."""
        self._monitor.close()
        tracking, config = self.tracking, self.module.config
        tracking.status = status
        kind = None if error is None else type(error)
        tracking.__exit__(kind, error, None if error is None else error.__traceback__)
        if self._ranks.is_first and config.run.report and error is None:
            try_to(write_report, tracking.log.path.parent)


def _open_tracking(
    module: DovetailModule, run_dir: Path, resumed_at: tuple[int, int] | None, ranks: Ranks
) -> Tracking:
    """Open the log, and make the trackers, on rank 0."""
    if not ranks.is_first:
        return Tracking(SilentLog(run_dir), {}, {})
    checked, config, settings = module.checked, module.config, module.config.log
    params = config.to_flat_dict()
    chosen = {
        name: TrackerChoice(options, settings.options.get(name.rpartition(":")[2], {}))
        for name, options in checked.options("log").items()
    }
    log = open_log(run_dir, resumed_at, patience_s=settings.flush_s)
    pace: dict[str, Any] = {"flush_s": settings.flush_s, "calls_per_s": settings.calls_per_s}
    try:
        trackers, sidecar = make_trackers(
            checked.registry,
            RunInfo(config.run.name, run_dir.name, run_dir, params),
            chosen,
            follow=settings.follow,
            config_dir=checked.directory,
            **pace,
        )
    except DovetailError:
        log.close()
        if resumed_at is None:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return Tracking(log, trackers, params, sidecar, config_dir=checked.directory, **pace)
