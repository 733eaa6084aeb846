"""`MetricsTracker`: metrics of a training loop of one's own, one record per optimizer step."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dovetail.errors import ConfigError, MissingDependencyError, build_message
from dovetail.run.tracking.epochs import EpochTable
from dovetail.run.tracking.scalars import ClosedWindow, ScalarWindows, settle
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.values import as_number, check_name

if TYPE_CHECKING:
    from dovetail.types import Accumulator

COLUMNS = ("step", "effective_step", "metric", "value", "timestamp")
"""Columns of `MetricsTracker.get_step_metrics`."""

_WHERE = "MetricsTracker"


class MetricsTracker:
    """Keeps the metrics of a training loop of one's own, in a metric log and in memory.

    Each optimizer step becomes one record of `metrics.jsonl`, and one row of W&B, with the mean of
    each metric over the step's micro-batches. It is written when a value of another step arrives,
    or at `log_epoch`, `flush`, `close` and the end of the process: nothing is lost but by a kill,
    and that costs the open step alone. Any thread may log. In a distributed run only rank 0
    writes.

    Args:
        use_wandb: Feed a W&B run too. WANDB_MODE and WANDB_API_KEY in the environment count.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        directory: Where the log lies; a new folder in `runs/metrics` without it.
        wandb_options: Options of the `wandb` plugin, such as `{"project": "digits"}`.

    Raises:
        ConfigError: An argument is out of range, or W&B refuses to start.
        PluginError: The W&B plugin or its package is missing.
    """

    def __init__(
        self,
        use_wandb: bool = False,
        gradient_accumulation_steps: int = 1,
        *,
        directory: str | Path | None = None,
        wandb_options: Mapping[str, Any] | None = None,
    ) -> None:
        steps: Any = gradient_accumulation_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            found = f"gradient_accumulation_steps must be >= 1, got {steps!r}"
            hint = "Give the micro-batches per optimizer step."
            raise ConfigError(build_message(_WHERE, found, "an integer", hint))
        self.use_wandb = use_wandb
        self.gradient_accumulation_steps = steps
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        self.directory = Path(directory) if directory is not None else Path("runs/metrics", name)
        """Folder of the log; it is made with the first record."""
        self._wandb_options = dict(wandb_options or {})
        self._lock = threading.RLock()
        self._scalars = ScalarWindows(steps)
        self._epochs = EpochTable()
        self._step = self._micro_step = 0
        self._tracking: Tracking | None = None
        self._is_closed = False
        self._process = os.getpid()
        self._writes = _is_first_rank()
        if use_wandb and self._writes:
            self._open()
        # After W&B has registered its own: what is registered last is done first.
        atexit.register(self._close_at_exit)

    def attach(self, accumulator: Accumulator) -> None:
        """Let an accumulator say which optimizer step a value belongs to.

        `effective_step` is its own count from here on, tail windows and skipped steps taken into
        account; the values of a window that it skipped are not written. Log a metric before or
        after each `accumulate`, the same way throughout.
        """
        with self._lock:
            self._write_windows(self._scalars.close())
            self._scalars.attach(accumulator)

    def log_scalar(
        self, name: str, value: Any, step: int | None = None, commit: bool = True
    ) -> None:
        """Log one value.

        Args:
            name: Name of the metric.
            value: A number, a NumPy scalar or a tensor of one element, on any device.
            step: Micro-batch it belongs to, from 0. Without it, each name counts its own values:
                the third value of a name is that of micro-batch 2.
            commit: Whether a value of another optimizer step may close the step before. `False`
                holds it back: it is written with the next commit, flush or close.

        Raises:
            ConfigError: The name is empty, the value no number, or the step no index.
        """
        check_name(name, f"{_WHERE}.log_scalar")
        number = as_number(name, value, f"{_WHERE}.log_scalar")
        if number is None:
            return
        with self._lock:
            self._check_open()
            self._is_writer()
            self._write_windows(self._scalars.add(name, number, step, commit=commit))

    def log_epoch(
        self,
        epoch: int,
        train_metrics: Mapping[str, Any],
        val_metrics: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
        gradient_norm: float | None = None,
        epoch_duration: float | None = None,
    ) -> None:
        """Log the metrics of an epoch, and close the optimizer step that is open.

        Args:
            epoch: Number of the epoch.
            train_metrics: Names to numbers; they get the prefix "train/". Where there is a "loss",
                its perplexity, `exp(min(loss, 100))`, is logged too.
            val_metrics: The same for the validation data; nothing is made up without them.
            learning_rate: The last learning rate.
            gradient_norm: Norm of the gradient.
            epoch_duration: Seconds.

        Raises:
            ConfigError: A name is empty, or a value is no number.
        """
        others = {
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "epoch_duration": epoch_duration,
        }
        with self._lock:
            self._check_open()
            metrics = self._epochs.add(epoch, train_metrics, val_metrics or {}, others)
            self._write_windows(self._scalars.close())
            self._write("evaluation", metrics, epoch=int(epoch))

    def get_step_metrics(self) -> Any:
        """Return every value that was logged with `log_scalar`.

        Returns:
            A pandas DataFrame, sorted by step: `step` (micro-batch), `effective_step` (optimizer
            step), `metric`, `value`, `timestamp` (seconds since the epoch of Unix).

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pandas = _import_pandas("get_step_metrics")
        with self._lock:
            settle(self._scalars.rows)
            rows = sorted(self._scalars.rows, key=lambda row: row.step)
        dtypes = ("int64", "int64", "object", "float64", "float64")
        return pandas.DataFrame(
            {
                column: pandas.Series([getattr(row, column) for row in rows], dtype=dtype)
                for column, dtype in zip(COLUMNS, dtypes, strict=True)
            }
        )

    def get_summary(self) -> Any:
        """Return the epochs as a pandas DataFrame: `epoch`, then one column per metric.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pandas = _import_pandas("get_summary")
        with self._lock:
            return pandas.DataFrame(self._epochs.rows)

    def get_best_epoch(self, metric: str = "val/loss", mode: str = "min") -> int:
        """Return the epoch with the smallest ("min") or largest ("max") value of a metric.

        The first of several; NaN is never best.

        Raises:
            ConfigError: No epoch has the metric, or the mode is another.
        """
        with self._lock:
            return self._epochs.best(metric, mode)

    def flush(self) -> None:
        """Write what is held, the open optimizer step too."""
        with self._lock:
            self._write_windows(self._scalars.close())

    def close(self) -> None:
        """Write what is held and finish; done at the end of the process if not before."""
        self._close("completed")

    def __enter__(self) -> MetricsTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(_status_after(value))

    def _write_windows(self, windows: Sequence[ClosedWindow]) -> None:
        for window in windows:
            self._step, self._micro_step = window.step, window.last_micro_step + 1
            self._write("step", window.means)

    def _write(self, kind: str, metrics: Mapping[str, float], **fields: int) -> None:
        if self._is_writer():
            axes = {"step": self._step, "micro_step": self._micro_step, **fields}
            self._open().log.write({"kind": kind, **axes, "time": time.time(), "metrics": metrics})

    def _is_writer(self) -> bool:
        # Once another rank, always another rank: process groups end before the last record.
        self._writes = self._writes and _is_first_rank()
        return self._writes

    def _open(self) -> Tracking:
        if self._tracking is None:
            params = {"gradient_accumulation_steps": self.gradient_accumulation_steps}
            options = self._wandb_options if self.use_wandb else None
            self._tracking = _open_tracking(self.directory, params, options)
        return self._tracking

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError(build_message(_WHERE, "is closed", action="Make a new one."))

    def _close_at_exit(self) -> None:
        # At a prompt it is the last error shown, which may be long ago.
        is_prompt = hasattr(sys, "ps1")
        self._close(_status_after(None if is_prompt else getattr(sys, "last_value", None)))

    def _close(self, status: str) -> None:
        with self._lock:
            # A forked process has a copy of what is held, and no claim to the log.
            if self._is_closed or self._process != os.getpid():
                return
            self._write_windows(self._scalars.close())
            self._is_closed = True
            atexit.unregister(self._close_at_exit)
            if self._tracking is not None:
                self._tracking.status = status
                self._tracking.__exit__(None, None, None)


def _open_tracking(
    directory: Path, params: Mapping[str, Any], wandb_options: Mapping[str, Any] | None
) -> Tracking:
    """Open the log, with W&B if there are options for it."""
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    log = open_log(directory)
    if wandb_options is None:
        return Tracking(log, {}, params).__enter__()
    from dovetail.registry import default_registry
    from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
    from dovetail.types import RunInfo

    registry = default_registry()
    try:
        options = registry.build_options("log", "wandb", wandb_options)
        info = RunInfo("metrics", directory.resolve().name, directory, params)
        choice = TrackerChoice(options, wandb_options)
        trackers, sidecar = make_trackers(registry, info, {"wandb": choice})
    except BaseException:
        log.close()
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    return Tracking(log, trackers, params, sidecar).__enter__()


def _status_after(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _is_first_rank() -> bool:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0").strip() in ("", "0")


def _import_pandas(method: str) -> Any:
    try:
        import pandas
    except ImportError as err:
        found = f"needs pandas, which does not import ({err})"
        hint = "Run: pip install pandas"
        message = build_message(f"{_WHERE}.{method}", found, action=hint)
        raise MissingDependencyError(message) from err
    return pandas
