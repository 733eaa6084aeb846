"""Sends a run's metrics, settings, figures and artifacts to Weights & Biases.

Files lie in the run's folder under `wandb/`; `wandb sync` uploads those of an offline run. No code
is uploaded, nothing is captured from or printed to the console, and nobody is asked to log in.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, MissingDependencyError, build_message
from dovetail.types import Capability, RunInfo

dovetail_api = 1

Mode: TypeAlias = Literal["online", "offline", "disabled"]

_AXIS = "optimizer_step"
_WHERE = "plugin 'wandb' hook dovetail_log"
_EXIT_CODES = {"completed": 0, "interrupted": 255}
"""255 is what W&B itself takes for an interrupt; everything else has failed."""


class Options(PluginOptions):
    """Options of the W&B tracker."""

    project: str | None = None
    """Project of the run. By default the run's name."""
    entity: str | None = None
    """User or team that owns the project. By default that of the login."""
    group: str | None = None
    """Group to list the run in."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: Mode = "online"
    """`offline` writes files only, `disabled` nothing. WANDB_MODE in the environment can turn an
    online run into one of these, never the other way round."""


@hookimpl
def dovetail_log(run: RunInfo, options: Options) -> WandbTracker:
    """Return a tracker that feeds one W&B run, resumed if it exists already.

    Raises:
        MissingDependencyError: The package wandb is not installed.
        ConfigError: The run is online and W&B takes no login or refuses a setting.
    """
    return WandbTracker(run, options)


class WandbTracker:
    """Feeds one W&B run: each record of the log is one row of its history.

    W&B drops a row whose step is below that of the row before. The rows are therefore left to
    W&B's own count, which only grows, and the optimizer step is a value in each row and the axis
    of every chart.

    W&B's own process writes them. When ours is killed, rows that it had not written yet are lost
    here, and a run that is resumed adds some a second time; the last one of a step counts, and
    `metrics.jsonl` has them all.

    Args:
        run: The run to follow.
        options: The plugin's options.
    """

    def __init__(self, run: RunInfo, options: Options) -> None:
        self._wandb = _import_wandb()
        self._name = run.name
        mode = _effective_mode(options.mode)
        try:
            with _nobody_to_ask():
                self._run = self._start(run, options, mode)
        except (self._wandb.errors.UsageError, self._wandb.errors.AuthenticationError) as error:
            raise ConfigError(_refusal(error, mode)) from error
        self._run.define_metric(_AXIS, hidden=True)
        self._run.define_metric("*", step_metric=_AXIS)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Settings and artifacts, and figures where Pillow is installed, which W&B reads by."""
        if find_spec("PIL") is None:
            return frozenset({"params", "artifacts"})
        return frozenset({"params", "figures", "artifacts"})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Commit `metrics` as one row."""
        self._run.log({**metrics, _AXIS: step}, commit=True)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the settings; those of a run that is resumed are replaced."""
        self._run.config.update(dict(params), allow_val_change=True)

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Commit a picture as a row of its own."""
        self._run.log({name: self._wandb.Image(str(path)), _AXIS: step}, commit=True)

    def log_artifact(self, name: str, path: Path) -> None:
        """Record a file or a folder, which must stay where it is until it is uploaded."""
        kind = "folder" if path.is_dir() else "file"
        artifact = self._wandb.Artifact(_safe(f"{self._name}-{name}"), type=kind)
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        # The run's folder keeps it; W&B's copies for staging and cache would be two more.
        add(str(path), skip_cache=True, policy="immutable")
        self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        """Finish the run; W&B's own process may write its last records after this returns."""
        self._run.finish(exit_code=_EXIT_CODES.get(status, 1))

    def _start(self, run: RunInfo, options: Options, mode: str) -> Any:
        run.directory.mkdir(parents=True, exist_ok=True)
        return self._wandb.init(
            project=options.project or _safe(run.name),
            entity=options.entity,
            group=options.group,
            tags=list(options.tags),
            id=_safe(run.id),
            name=run.id,
            resume="allow",
            # Another run of this process is none of ours, and `wandb.run` stays as it is.
            reinit="create_new",
            mode=mode,
            dir=str(run.directory),
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,  # with git, W&B uploads the changes that are not committed
                disable_job_creation=True,
            ),
        )


def _import_wandb() -> Any:
    # Read when wandb is imported: without it, wandb reports its own errors to its makers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        found = f"the package wandb does not import ({error})"
        action = 'Run: pip install "dovetail[wandb]"'
        raise MissingDependencyError(build_message(_WHERE, found, action=action)) from error
    return wandb


def _effective_mode(mode: Mode) -> str:
    wanted = os.environ.get("WANDB_MODE", "").lower().replace("dryrun", "offline")
    return wanted if mode == "online" and wanted in ("offline", "disabled") else mode


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Take the terminal away: W&B raises where it would prompt and wait for an answer."""
    terminal = sys.stdin
    with Path(os.devnull).open() as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = terminal


def _refusal(error: Exception, mode: str) -> str:
    found = f"W&B refuses to start a run in mode {mode!r} ({str(error).strip().rstrip('.')})"
    action = (
        'Set WANDB_API_KEY, or run `wandb login`, or set log.wandb.mode = "offline" and upload '
        "later with `wandb sync`."
    )
    return build_message(_WHERE, found, action=action if mode == "online" else "")


def _safe(name: str) -> str:
    """Replace what W&B refuses in the names of projects, runs and artifacts."""
    return re.sub(r"[^\w.-]", "-", name)[:128]
