"""`dovetail plugins show`."""

from __future__ import annotations

import click

from dovetail.cli._console import say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import admission_options, flagged_admission
from dovetail.registry.listing import ROLES, Role, list_entry_points


@click.command()
@click.argument("name")
@click.option("--hook", type=click.Choice(ROLES), help="Only the plugin of this hook.")
@admission_options
@debug_option
def show(name: str, hook: Role | None) -> None:
    """Show a plugin with its options.

    NAME may be HOOK.NAME or DISTRIBUTION:NAME. A name that several hooks know is shown for each.
    The plugin is imported for it.
    """
    from dovetail.cli._details import describe_plugin, find_plugins

    everyone = list_entry_points()
    admission = flagged_admission()
    admission.check(everyone)
    for index, info in enumerate(find_plugins(everyone, name, hook, admission)):
        if index:
            say()
        for line in describe_plugin(info):
            say(line)
