"""`dovetail train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail._version import __version__
from dovetail.cli._console import complain, say
from dovetail.cli._errors import FAILED, INTERRUPTED, debug_option

if TYPE_CHECKING:
    from dovetail.cli._screen import Screen
    from dovetail.cli._watch import RunWatcher
    from dovetail.pipeline import TrainingResult

_HEARTBEAT_S = 10.0


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    metavar="[RUN]",
    is_flag=False,
    flag_value="latest",
    help="Go on with a run: its folder, its id, or the latest one.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print errors and the paths at the end only.")
@click.option("--plain", is_flag=True, help="Print lines instead of a bar, as into a pipe.")
@debug_option
def train(
    config: Path, overrides: tuple[str, ...], resume: str | None, quiet: bool, plain: bool
) -> None:
    """Train a model as a config says, and export it.

    CONFIG is a TOML or JSON file. KEY=VALUE sets one of its fields, such as train.lr=3e-4 or
    'log.use=["tensorboard"]'. Ctrl-C ends the run after the step under way, with a checkpoint.
    """
    from dovetail.cli._screen import Screen, choose_mode
    from dovetail.cli._watch import RunWatcher

    _check_early(config, overrides, resume)
    screen = Screen(choose_mode(quiet=quiet, plain=plain))
    watcher = RunWatcher(screen.say, _HEARTBEAT_S if screen.mode == "plain" else None)
    try:
        result = _train(config, overrides, resume, screen, watcher)
    except KeyboardInterrupt:
        complain("interrupted")
        for line in _describe_resume(config, overrides, watcher.run_dir):
            say(line)
        raise click.exceptions.Exit(INTERRUPTED) from None
    _print_result(result, config, overrides, screen)


def _check_early(config: Path, overrides: tuple[str, ...], resume: str | None) -> None:
    """Refuse what can be refused before torch is imported, which takes seconds."""
    from dovetail.config import apply_overrides, read_config_file

    if resume is not None and ("=" in resume or resume.endswith((".toml", ".json"))):
        raise click.UsageError(
            f"--resume takes {resume!r} for a run. Put it last, or write --resume=latest.",
            click.get_current_context(),
        )
    apply_overrides(read_config_file(config), overrides)


def _train(
    config: Path,
    overrides: tuple[str, ...],
    resume: str | None,
    screen: Screen,
    watcher: RunWatcher,
) -> TrainingResult:
    screen.say(f"dovetail {__version__}: train {config}")
    with screen.bar(watcher.standing), screen.warnings_as_lines():
        from dovetail import pipeline

        try:
            return pipeline.train(config, overrides, resume=resume, observer=watcher)
        finally:
            watcher.finish()


def _print_result(
    result: TrainingResult, config: Path, overrides: tuple[str, ...], screen: Screen
) -> None:
    from dovetail.cli._results import describe_paths, describe_result

    is_first_process = screen.mode != "quiet"
    if screen.mode != "quiet":
        for line in describe_result(result):
            say(line)
        say()
    for line in describe_paths(result):
        say(line)
    if result.status == "interrupted":
        for line in _describe_resume(config, overrides, result.run_dir):
            say(line)
        raise click.exceptions.Exit(INTERRUPTED)
    if result.bundle is not None:
        if is_first_process:
            say()
            say(f"next: {shlex.join(['dovetail', 'verify', str(result.bundle.path)])}")
        if not result.bundle.is_complete:
            raise click.exceptions.Exit(FAILED)


def _describe_resume(
    config: Path, overrides: tuple[str, ...], run_dir: Path | None
) -> Iterator[str]:
    """Yield the command that goes on with a run, if it has anything to go on from."""
    if run_dir is None or not any((run_dir / "checkpoints").glob("step-*")):
        yield "there is no checkpoint to resume from"
        return
    command = ["dovetail", "train", str(config), *overrides, "--resume", str(run_dir)]
    yield f"resume with: {shlex.join(command)}"
