"""`dovetail train`."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail._version import __version__
from dovetail.cli._console import complain, say
from dovetail.cli._errors import BAD_USAGE, FAILED, INTERRUPTED, debug_option
from dovetail.cli._options import admission_options, flagged_registry, spell_admission
from dovetail.cli._screen import Screen, choose_mode, is_first_process
from dovetail.cli._watch import RunWatcher
from dovetail.errors import ConfigError, DovetailError

if TYPE_CHECKING:
    from dovetail.pipeline import TrainingResult

_HEARTBEAT_S = 10.0
_LOST_S = 1.0
"""How long a process that has lost another one waits, so that the launcher sees that one first."""


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False, metavar="CONFIG")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    metavar="[RUN]",
    is_flag=False,
    flag_value="latest",
    help="Go on with a run: its folder, its id, or the latest one.",
)
@click.option(
    "--frozen",
    type=click.Path(path_type=Path),
    metavar="LOCK",
    help="Run with exactly the plugins of this plugins.lock.json, or of this run's folder.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print errors and the paths at the end only.")
@click.option("--plain", is_flag=True, help="Print lines instead of a bar, as into a pipe.")
@admission_options
@debug_option
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    resume: str | None,
    frozen: Path | None,
    quiet: bool,
    plain: bool,
) -> None:
    """Train a model as a config says, and export it.

    CONFIG is a TOML or JSON file. KEY=VALUE sets one of its fields, such as train.lr=3e-4 or
    'log.use=["tensorboard"]'. Ctrl-C ends the run after the step under way, with a checkpoint.
    """
    if config is None or (resume is not None and _is_config(resume)):
        hint = f" --resume took {resume!r} for a run: put it last." if resume else ""
        raise click.UsageError(f"Missing argument 'CONFIG'.{hint}", click.get_current_context())
    with _failure_told_once():
        _check_early(config, overrides, frozen)
        _run(config, overrides, resume, frozen, Screen(choose_mode(quiet=quiet, plain=plain)))


def _run(
    config: Path,
    overrides: tuple[str, ...],
    resume: str | None,
    frozen: Path | None,
    screen: Screen,
) -> None:
    watcher = RunWatcher(screen.say, _HEARTBEAT_S if screen.mode == "plain" else None)
    try:
        result = _train(config, overrides, resume, frozen, screen, watcher)
    except KeyboardInterrupt:
        if is_first_process():
            complain("interrupted")
            for line in _describe_resume(config, overrides, frozen, watcher.run_dir):
                say(line)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except Exception:
        if watcher.run_dir is not None:
            complain(f"what the run left behind: {watcher.run_dir}")
        raise
    _print_result(result, config, overrides, frozen, screen)


@contextmanager
def _failure_told_once() -> Iterator[None]:
    """Context in which one process of several tells what they all failed with.

    What one failed with alone, it tells itself, with its rank, and the launcher's summary too.
    """
    try:
        yield
    except (click.exceptions.Exit, click.ClickException):
        raise
    except Exception as err:
        if "WORLD_SIZE" not in os.environ:
            raise
        from dovetail.run.distributed import (
            LostRankError,
            is_shared,
            num_launched,
            record_failure,
        )

        if num_launched() == 1:
            raise
        if isinstance(err, LostRankError):
            if is_first_process():
                complain(f"error: {err}")
            time.sleep(_LOST_S)
            raise click.exceptions.Exit(FAILED) from err
        record_failure(err)
        if is_first_process() or not (is_shared(err) or isinstance(err, DovetailError)):
            raise
        if not is_shared(err):
            complain(f"error on rank {os.environ['RANK']}: {err}")
        raise click.exceptions.Exit(BAD_USAGE if isinstance(err, ConfigError) else FAILED) from err


def _is_config(text: str) -> bool:
    """Return whether what `--resume` took was meant as CONFIG or as an override."""
    return ("=" in text or text.endswith((".toml", ".json"))) and not Path(text).is_dir()


def _check_early(config: Path, overrides: tuple[str, ...], frozen: Path | None) -> None:
    """Refuse what can be refused before torch is imported, which takes seconds."""
    from dovetail.config import apply_overrides, read_config_file
    from dovetail.registry.lock import read_lock

    apply_overrides(read_config_file(config), overrides)
    if frozen is not None:
        read_lock(frozen)


def _train(
    config: Path,
    overrides: tuple[str, ...],
    resume: str | None,
    frozen: Path | None,
    screen: Screen,
    watcher: RunWatcher,
) -> TrainingResult:
    screen.say(f"dovetail {__version__}: train {config}")
    with screen.bar(watcher.standing), screen.warnings_as_lines():
        from dovetail import pipeline

        try:
            return pipeline.train(
                config,
                overrides,
                resume=resume,
                frozen=frozen,
                registry=flagged_registry(),
                observer=watcher,
            )
        finally:
            watcher.finish()


def _print_result(
    result: TrainingResult,
    config: Path,
    overrides: tuple[str, ...],
    frozen: Path | None,
    screen: Screen,
) -> None:
    from dovetail.cli._results import describe_paths, describe_result

    is_interrupted = result.status == "interrupted"
    failures = result.bundle.failures if result.bundle is not None else ()
    if is_first_process():
        if screen.mode == "quiet":
            for failure in failures:
                complain(f"error: {failure}")
        else:
            for line in describe_result(result):
                say(line)
            say()
        for line in describe_paths(result):
            say(line)
        if is_interrupted:
            for line in _describe_resume(config, overrides, frozen, result.run_dir):
                say(line)
        elif result.bundle is not None:
            say(f"check it with: {shlex.join(['dovetail', 'verify', str(result.bundle.path)])}")
    if is_interrupted or failures:
        raise click.exceptions.Exit(INTERRUPTED if is_interrupted else FAILED)


def _describe_resume(
    config: Path, overrides: tuple[str, ...], frozen: Path | None, run_dir: Path | None
) -> Iterator[str]:
    """Yield the command that goes on with a run, if it has anything to go on from."""
    if run_dir is None or not any((run_dir / "checkpoints").glob("step-*")):
        yield "there is no checkpoint to resume from"
        return
    plugins = [*(["--frozen", str(frozen)] if frozen else []), *spell_admission()]
    from dovetail.run.launch import spell_command

    command = [
        *spell_command(),
        "train",
        str(config),
        *overrides,
        *plugins,
        "--resume",
        str(run_dir),
    ]
    yield f"resume with: {shlex.join(command)}"
