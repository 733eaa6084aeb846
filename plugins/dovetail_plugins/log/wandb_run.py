"""Opens the W&B run that a tracker feeds, and learns what is in it already."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.errors import ConfigError, MissingDependencyError, build_message
from dovetail.types import RunInfo
from dovetail_plugins.log.wandb_file import find_wandb_files
from dovetail_plugins.log.wandb_rows import KnownRows, read_known, wait_until_written

if TYPE_CHECKING:
    from dovetail_plugins.log.wandb import Options

_WHERE = "plugin 'wandb' hook dovetail_log"


def import_wandb() -> Any:
    """Return the package.

    Raises:
        MissingDependencyError: It is not installed.
    """
    # Read when wandb is imported: without it, wandb reports its own errors to its makers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        found = f"the package wandb does not import ({error})"
        action = 'Run: pip install "dovetail[wandb]"'
        raise MissingDependencyError(build_message(_WHERE, found, action=action)) from error
    return wandb


def find_open_run() -> Any:
    """Return the W&B run that the program has open in this process, or `None`."""
    return getattr(sys.modules.get("wandb"), "run", None)


def join_run(opened: Any) -> tuple[Any, KnownRows]:
    """Return a run of the program's own, and what earlier processes left of it."""
    present = Path(opened.settings.sync_file).resolve()
    files = find_wandb_files(Path(opened.settings.wandb_dir).resolve())
    earlier = [path for path in files if path.name == present.name and path != present]
    return opened, read_known(earlier, None if opened.offline else opened.starting_step)


def start_run(run: RunInfo, options: Options) -> tuple[Any, KnownRows]:
    """Return a run of W&B in the run's folder, and what earlier processes left of it.

    Raises:
        ConfigError: The run is online and W&B takes no login or refuses a setting.
    """
    _leave_service_of_parent()
    wandb, mode = import_wandb(), effective_mode(options.mode)
    run_id = safe_name(options.id or run.id)
    run.directory.mkdir(parents=True, exist_ok=True)
    files = [
        p for p in find_wandb_files(run.directory / "wandb") if p.name == f"run-{run_id}.wandb"
    ]
    wait_until_written(files)
    if "x_sync_dir_suffix" not in wandb.Settings.model_fields:
        _wait_for_another_second(files)
    try:
        with _nobody_to_ask():
            opened = _start(wandb, run, options, run_id, mode)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ConfigError(_refusal(error, mode)) from error
    return opened, read_known(files, opened.starting_step if mode == "online" else None)


def effective_mode(mode: str) -> str:
    """Return the mode of a run: the environment can only take it offline."""
    wanted = os.environ.get("WANDB_MODE", "").lower().replace("dryrun", "offline")
    return wanted if mode == "online" and wanted in ("offline", "disabled") else mode


def safe_name(name: str) -> str:
    """Replace what W&B refuses in the names of projects, runs and artifacts."""
    return re.sub(r"[^\w.-]", "-", name)[:128]


def _start(wandb: Any, run: RunInfo, options: Options, run_id: str, mode: str) -> Any:
    return wandb.init(
        project=options.project or safe_name(run.name),
        entity=options.entity,
        group=options.group,
        job_type=options.job_type,
        tags=list(options.tags),
        notes=options.notes,
        id=run_id,
        name=run.id,
        # A run of files ignores it, and says so.
        resume="allow" if mode == "online" else None,
        # Another run of this process is none of ours, and `wandb.run` stays as it is.
        reinit="create_new",
        mode=mode,
        dir=str(run.directory),
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,  # with git, W&B uploads the changes that are not committed
            disable_job_creation=True,
        ),
    )


def _leave_service_of_parent() -> None:
    """Have W&B start a process of its own for us.

    That of a parent would go down with it, in the middle of a row, and would take a run for open
    whose own process was killed.
    """
    token = os.environ.get("WANDB_SERVICE", "").split("-")
    if len(token) > 1 and token[1] != str(os.getpid()):
        del os.environ["WANDB_SERVICE"]


def _wait_for_another_second(files: Sequence[Path]) -> None:
    """Let a second pass in which a run was begun: earlier releases overwrite its files."""
    while any(time.strftime("run-%Y%m%d_%H%M%S-") in path.parent.name for path in files):
        time.sleep(1 - time.time() % 1)


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
