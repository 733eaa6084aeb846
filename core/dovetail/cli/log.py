"""`dovetail log`: the trackers of runs that are over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail.cli._console import complain, say
from dovetail.cli._errors import FAILED, debug_option
from dovetail.cli._options import admission_options, flagged_registry
from dovetail.cli._runs import dir_option

if TYPE_CHECKING:
    from dovetail.run.tracking.sync import SyncResult


@click.group()
@debug_option
def log() -> None:
    """Hand a run's records to trackers that lack them."""


@log.command()
@click.argument("wanted", metavar="RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--to",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this tracker, also one that the run did not have; may be repeated.",
)
@dir_option
@admission_options
@debug_option
def sync(wanted: str, overrides: tuple[str, ...], names: tuple[str, ...], root: Path) -> None:
    """Hand a run's records to trackers that lack them.

    Trackers are those of the run's config, with their options there. Each gets what it lacks of
    the metric log; nothing is stored twice, so the command may be repeated. The run must be over.
    The exit status is 1 if a tracker still lacks records, else 0.

    RUN is a run's folder, its id, or "latest". KEY=VALUE sets an option of a tracker, such as
    log.wandb.mode=online: the tracker is then given the whole run, as for another store.
    """
    from dovetail.cli._screen import warnings_as_lines
    from dovetail.run.lookup import resolve_run
    from dovetail.run.tracking.sync import sync_run

    run_dir = resolve_run(wanted, root)
    say(f"sync {run_dir}")
    with warnings_as_lines(complain):
        results = sync_run(run_dir, names, overrides, registry=flagged_registry())
    for name, result in results.items():
        for line in _describe(name, result):
            say(line)
    if any(result.parked_by is not None for result in results.values()):
        raise click.exceptions.Exit(FAILED)


def _describe(name: str, result: SyncResult) -> Iterator[str]:
    for file, reason in result.refused.items():
        yield f"{name}: does not take {file}: {_one_line(reason)}"
    count = f"{result.num_records} record{'' if result.num_records == 1 else 's'}"
    if result.had_everything:
        yield f"{name}: has everything already"
    elif result.parked_by is None:
        yield f"{name}: was given {count} and has everything"
    else:
        given = f"was given {count} and " if result.num_records else ""
        yield f"{name}: {given}is parked: {_one_line(result.parked_by)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
