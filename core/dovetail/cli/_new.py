"""`dovetail plugins new`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from dovetail.cli._console import say
from dovetail.cli._errors import debug_option
from dovetail.registry.listing import ROLES, Role


class _HookChoice(click.Choice[str]):
    """A choice whose error fits on a line when nothing is chosen."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Return what is added to the error."""
        return f"It is one of {', '.join(ROLES)}."


@click.command()
@click.argument("name")
@click.option(
    "--hook",
    type=_HookChoice(ROLES),
    required=True,
    help='The hook it implements; "wrap" for a plugin around hooks.',
)
@click.option(
    "--output",
    "-o",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    metavar="FOLDER",
    help="Where its folder goes; the working folder without it.",
)
@debug_option
def new(name: str, hook: Role, output: Path) -> None:
    """Write a new plugin: a distribution that works, with tests, ready to be changed.

    NAME is what a config will call it. Its distribution is dovetail-NAME, and the folder too.
    Nothing is overwritten.
    """
    from dovetail.scaffold import PluginNames, config_example, write_plugin

    folder = write_plugin(name, hook, output)
    names = PluginNames(folder.name.removeprefix("dovetail-"))
    kind = "a plugin around hooks" if hook == "wrap" else f"a plugin of the {hook} hook"
    say(f"wrote {folder}, {kind}:")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        say(f"  {path.relative_to(folder).as_posix()}")
    say()
    say("It works as it is. To install and test it:")
    for command in (
        f"cd {shlex.quote(str(folder))}",
        "pip install --editable . --group test   # pip 25.1 or newer",
        "pytest",
        f"dovetail plugins show {names.backend}",
    ):
        say(f"  {command}")
    say()
    say("To use it, in a config:")
    for line in config_example(names, hook).splitlines():
        say(f"  {line}".rstrip())
