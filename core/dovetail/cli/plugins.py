"""`dovetail plugins`: what is installed, found by listing; nothing is imported for the list."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import FAILED, debug_option
from dovetail.cli._state import PluginState, load_state, read_state
from dovetail.registry.listing import ROLES, PluginInfo, Role, list_entry_points

_HEADER = ("HOOK", "NAME", "DISTRIBUTION", "VERSION", "STATE")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
check_option = click.option(
    "--check", is_flag=True, help="Import every listed plugin and say which are broken."
)


class PluginsGroup(click.Group):
    """`plugins`, `plugins HOOK` and `plugins show NAME`."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return `show`, or the list of one hook."""
        found = super().get_command(ctx, cmd_name)
        return _list_of(role) if found is None and (role := _as_role(cmd_name)) else found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which hooks there are."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from dovetail.errors import did_you_mean

            hint = did_you_mean(args[0], ROLES) or f"One plugin: {ctx.command_path} show {args[0]}"
            message = f"{args[0]!r} is no hook; the hooks are {', '.join(ROLES)}. {hint}"
            raise click.UsageError(message, ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=PluginsGroup, invoke_without_command=True, subcommand_metavar="[HOOK | show NAME]")
@json_option
@check_option
@debug_option
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, check: bool) -> None:
    """List the installed plugins, or show one.

    The list is read from the metadata of the installed packages; no plugin is imported for it.
    "ready" says that all it declares to need is there; --check imports the plugins and knows.

    HOOK is compile, collate, accumulate, log, export, or wrap for plugins that wrap hooks.
    """
    ctx.obj = (as_json, check)
    if ctx.invoked_subcommand is None:
        _print_list(None, as_json=as_json, check=check)


@plugins.command()
@click.argument("name")
@click.option("--hook", type=click.Choice(ROLES), help="Only the plugin of this hook.")
@debug_option
def show(name: str, hook: Role | None) -> None:
    """Show a plugin with its options.

    NAME may be HOOK.NAME or DISTRIBUTION:NAME. A name that several hooks know is shown for each.
    The plugin is imported for it.
    """
    from dovetail.cli._details import describe_plugin, find_plugins

    for index, info in enumerate(find_plugins(list_entry_points(), name, hook)):
        if index:
            say()
        for line in describe_plugin(info):
            say(line)


def _as_role(text: str) -> Role | None:
    return next((role for role in ROLES if role == text), None)


def _list_of(role: Role) -> click.Command:
    @click.command(role, help=f"List the plugins of {role}.")
    @json_option
    @check_option
    @debug_option
    @click.pass_context
    def list_role(ctx: click.Context, as_json: bool, check: bool) -> None:
        outer_json, outer_check = ctx.obj
        _print_list(role, as_json=as_json or outer_json, check=check or outer_check)

    return list_role


def _print_list(role: Role | None, *, as_json: bool, check: bool) -> None:
    everyone = list_entry_points()
    listed = [info for info in everyone if role in (None, info.role)]
    states = [load_state(info) if check else read_state(info, everyone) for info in listed]
    if as_json:
        say(json.dumps([_as_json(*row) for row in zip(listed, states, strict=True)], indent=2))
    else:
        for line in _describe(listed, states, role):
            say(line)
    if any(state.is_broken for state in states):
        raise click.exceptions.Exit(FAILED)


def _describe(
    listed: Sequence[PluginInfo], states: Sequence[PluginState], role: Role | None
) -> list[str]:
    if not listed:
        return [f"No plugin {f'of {role} ' if role else ''}is installed."]
    rows = [
        (info.role, info.name, info.distribution, info.version, state.text)
        for info, state in zip(listed, states, strict=True)
    ]
    lines = format_columns(rows, _HEADER)
    reasons = [f"- {state.reason}" for state in states if state.reason]
    installs = dict.fromkeys(f"  {state.install}" for state in states if state.install)
    if reasons:
        lines += ["", *reasons]
    if installs:
        lines += ["", "To install what is missing:", *installs]
    return lines


def _as_json(info: PluginInfo, state: PluginState) -> dict[str, str | None]:
    return {
        "hook": info.role,
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "object": info.value,
        "state": state.text,
        "reason": state.reason,
        "install": state.install,
    }
