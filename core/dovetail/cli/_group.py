"""The group of commands; a command is imported when it is called, not when it is listed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from dovetail._version import __version__
from dovetail.cli._errors import debug_option, run_guarded
from dovetail.cli._table import TableGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("dovetail.cli.train:train", "Train a model as a config says, and export it."),
    "verify": ("dovetail.cli.verify:verify", "Run a bundle's artifacts and compare the outputs."),
    "runs": ("dovetail.cli.runs:runs", "List runs and how they went, or compare some."),
    "report": ("dovetail.cli.report:report", "Draw the curves of runs into one page."),
    "watch": ("dovetail.cli.watch:watch", "Follow a run that is under way."),
    "log": ("dovetail.cli.log:log", "Hand a run's records to trackers that lack them."),
    "plugins": (
        "dovetail.cli.plugins:plugins",
        "List, show and check plugins, or write a new one.",
    ),
    "schema": ("dovetail.cli.schema:schema", "Print the JSON Schema of the config, or write it."),
    "version": ("dovetail.cli.version:version", "Print the versions of what a run builds on."),
}
"""Where each command is, and its line in the help."""

_EPILOG = """\
\b
Exit status:
  0    done
  1    the run failed, or a format or a proof did
  2    the config or the arguments do not fit
  130  interrupted; the run's last line says how to resume it
"""

_COMPLETION = "_DOVETAIL_COMPLETE"


class LazyGroup(TableGroup):
    """The commands of the table, with errors as messages."""

    table = COMMANDS

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was meant."""
        if args[0] in COMMANDS or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        from dovetail.errors import did_you_mean

        hint = did_you_mean(args[0], COMMANDS) or f"The commands are: {', '.join(COMMANDS)}."
        raise click.UsageError(f"There is no command {args[0]!r}. {hint}", ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; whatever it raises becomes a message and an exit status."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or _COMPLETION in os.environ:
            return super().main(arguments, prog_name, complete_var, standalone_mode, **extra)

        def work() -> Any:
            # click's own main would take an EOFError of the user's code for a Ctrl-C.
            with self.make_context(prog_name or "dovetail", list(arguments), **extra) as ctx:
                return self.invoke(ctx)

        sys.exit(run_guarded(work, arguments))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="dovetail", message="%(prog)s %(version)s")
@debug_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train PyTorch models with plugins that a config names."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
