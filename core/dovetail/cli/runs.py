"""`dovetail runs`: which runs there are and how they went."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import json_option
from dovetail.cli._runs import plain_value, spell_value
from dovetail.cli._table import TableGroup
from dovetail.run.spelling import spell_duration, spell_time

if TYPE_CHECKING:
    from dovetail.run.overview import RunSummary

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "compare": ("dovetail.cli._compare:compare", "Put results and settings of runs side by side."),
}
"""Where each command is, and its line in the help."""

_Command = TypeVar("_Command", bound=Callable[..., Any])

_HEADER = ("RUN", "STATUS", "STEPS", "BEST", "LAST", "TOOK", "STARTED (UTC)")
_FILTERS = "dovetail.cli.runs."


class RunsGroup(TableGroup):
    """`runs`, `runs DIR` and the commands of the table."""

    table = SUBCOMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command of the table, or the list of a folder."""
        return super().get_command(ctx, cmd_name) or _list_of(Path(cmd_name))


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        ctx.meta[f"{_FILTERS}{param.name}"] = value


def _filters(command: _Command) -> _Command:
    """Add the options that choose runs, before and behind the folder."""
    name = click.option(
        "--name", expose_value=False, callback=_remember, help="Only runs of this name."
    )
    status = click.option(
        "--status",
        metavar="STATUS",
        expose_value=False,
        callback=_remember,
        help='Only runs of this status: running, completed, "stopped early", interrupted, '
        "failed, crashed (gone without an end) or empty.",
    )
    return name(status(command))


@click.group(
    cls=RunsGroup,
    invoke_without_command=True,
    subcommand_metavar="[DIR | COMMAND [ARGS]...]",
)
@json_option
@_filters
@debug_option
@click.pass_context
def runs(ctx: click.Context, as_json: bool) -> None:
    """List runs and how they went, or compare some.

    The oldest comes first. BEST and LAST are values of the metric that decides which checkpoint is
    best. TOOK leaves out the pauses before a resume. DIR is the folder that holds the runs,
    without it "runs".
    """
    if ctx.invoked_subcommand is None:
        _print_list(ctx, Path("runs"), as_json=as_json)


def _list_of(root: Path) -> click.Command:
    @click.command(str(root), help=f"List the runs in {root}.")
    @json_option
    @_filters
    @debug_option
    @click.pass_context
    def list_runs_in(ctx: click.Context, as_json: bool) -> None:
        if not root.is_dir():
            raise click.UsageError(
                f"{str(root)!r} is neither a folder nor one of the commands "
                f"{', '.join(SUBCOMMANDS)}.",
                ctx,
            )
        _print_list(ctx, root, as_json=as_json)

    return list_runs_in


def _print_list(ctx: click.Context, root: Path, *, as_json: bool) -> None:
    from dovetail.run.overview import STATUSES, list_runs

    name, status = (ctx.meta.get(f"{_FILTERS}{key}") for key in ("name", "status"))
    if status is not None and status not in STATUSES:
        message = f"there is no status {status!r}; there are {', '.join(STATUSES)}."
        raise click.UsageError(message, ctx)
    found = [
        run
        for run in list_runs(root)
        if name in (None, run.name) and (status is None or run.status == status)
    ]
    if as_json:
        say(json.dumps([as_plain(run) for run in found], indent=2))
        return
    if not found:
        kind = " ".join(word for word in (status, name) if word)
        say(f"There is no run {f'({kind}) ' if kind else ''}in {root}.")
    for index, line in enumerate(_describe(found)):
        if line or index:
            say(line)


def _describe(found: Sequence[RunSummary]) -> list[str]:
    groups: dict[tuple[str, str, str], list[RunSummary]] = {}
    for run in found:
        groups.setdefault((run.name, run.monitor, run.monitor_mode), []).append(run)
    lines = []
    for (name, monitor, mode), members in groups.items():
        wish = "smaller" if mode == "min" else "larger"
        lines += ["", f"{name}: {monitor}, the {wish} the better"]
        lines += _fit([_row(run) for run in members])
    return lines


def _row(run: RunSummary) -> tuple[str, ...]:
    return (
        run.id,
        run.status,
        str(run.num_steps),
        spell_value(run.best_value),
        spell_value(run.last_metrics.get(run.monitor)),
        spell_duration(run.duration_s) or "-",
        spell_time(run.started_s) or "-",
    )


def _fit(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align a table; where a terminal is too narrow for it, the last column goes."""
    lines = format_columns(rows, _HEADER)
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        return format_columns([row[:-1] for row in rows], _HEADER[:-1])
    return lines


def as_plain(run: RunSummary) -> dict[str, Any]:
    """Return a run as JSON holds it."""
    return {
        "run_dir": str(run.run_dir),
        "name": run.name,
        "id": run.id,
        "status": run.status,
        "error": run.error,
        "num_steps": run.num_steps,
        "monitor": run.monitor,
        "monitor_mode": run.monitor_mode,
        "best_value": run.best_value,
        "best_step": run.best_step,
        "best_metrics": {k: plain_value(v) for k, v in run.best_metrics.items()},
        "last_metrics": {k: plain_value(v) for k, v in run.last_metrics.items()},
        "started_s": run.started_s,
        "duration_s": run.duration_s,
        "num_resumes": run.num_resumes,
    }
