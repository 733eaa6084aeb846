"""`dovetail plugins`: what is installed, found by listing; nothing is imported for the list."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import click

from dovetail.cli._console import format_columns, say, wrap_text
from dovetail.cli._errors import FAILED, debug_option
from dovetail.cli._options import admission_options, check_option, flagged_admission, json_option
from dovetail.cli._state import PluginState, kept_out_state, probe, probed_state, read_state
from dovetail.cli._table import TableGroup
from dovetail.registry.admission import Admission
from dovetail.registry.listing import ROLES, PluginInfo, Role, list_entry_points

_HEADER = ("HOOK", "NAME", "DISTRIBUTION", "VERSION", "STATE")
_WIDTH = 80

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "show": ("dovetail.cli._show:show", "Show a plugin with its options."),
    "order": ("dovetail.cli._order:order", "Show what would run for a hook, outermost first."),
    "trace": ("dovetail.cli._trace:trace", "Show every hook call of a run, without training."),
    "doctor": ("dovetail.cli._doctor:doctor", "Look for what is wrong with the plugins."),
    "new": ("dovetail.cli._new:new", "Write a new plugin: a distribution that works."),
}
"""Where each command is, and its line in the help."""


class PluginsGroup(TableGroup):
    """`plugins`, `plugins HOOK` and the commands of the table."""

    table = SUBCOMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command of the table, or the list of one hook."""
        found = super().get_command(ctx, cmd_name)
        return _list_of(role) if found is None and (role := _as_role(cmd_name)) else found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which hooks there are."""
        known = (*SUBCOMMANDS, *ROLES)
        if not args[0].startswith("-") and args[0] not in known:
            from dovetail.errors import did_you_mean

            hint = did_you_mean(args[0], known) or f"One plugin: {ctx.command_path} show {args[0]}"
            message = f"{args[0]!r} is no hook; the hooks are {', '.join(ROLES)}. {hint}"
            raise click.UsageError(message, ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=PluginsGroup,
    invoke_without_command=True,
    subcommand_metavar="[HOOK | COMMAND [ARGS]...]",
)
@json_option
@check_option
@admission_options
@debug_option
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, check: bool) -> None:
    """List, show and check plugins, or write a new one.

    The list is read from the metadata of the installed packages; no plugin is imported for it.
    "ready" says that all it declares to need is there; --check imports the plugins and knows.

    HOOK is compile, collate, accumulate, log, export, or wrap for plugins that wrap hooks.

    Where no option says who may offer plugins, the environment may: DOVETAIL_PLUGIN_AUTOLOAD=0,
    DOVETAIL_PLUGIN_ALLOW=DIST,DIST.
    """
    if ctx.invoked_subcommand is None:
        _print_list(None, as_json=as_json, check=check)


def _as_role(text: str) -> Role | None:
    return next((role for role in ROLES if role == text), None)


def _list_of(role: Role) -> click.Command:
    @click.command(role, help=f"List the plugins of {role}.")
    @json_option
    @check_option
    @admission_options
    @debug_option
    def list_role(as_json: bool, check: bool) -> None:
        _print_list(role, as_json=as_json, check=check)

    return list_role


def _print_list(role: Role | None, *, as_json: bool, check: bool) -> None:
    everyone = list_entry_points()
    admission = flagged_admission()
    admission.check(everyone)
    listed = [info for info in everyone if role in (None, info.role)]
    states = _find_states(listed, everyone, admission, check=check)
    if as_json:
        say(json.dumps([_as_json(*row) for row in zip(listed, states, strict=True)], indent=2))
    else:
        for line in _describe(listed, states, role):
            say(line)
    if any(state.is_broken for state in states):
        raise click.exceptions.Exit(FAILED)


def _find_states(
    listed: Sequence[PluginInfo],
    everyone: Sequence[PluginInfo],
    admission: Admission,
    *,
    check: bool,
) -> list[PluginState]:
    offers = Counter((info.role, info.name) for info in everyone if admission.admits(info))
    seen = [info for info in listed if admission.admits(info)]
    if check:
        found = [probed_state(probed) for probed in probe(seen).values()]
    else:
        found = [read_state(p, is_shared=offers[p.role, p.name] > 1) for p in seen]
    states = dict(zip(seen, found, strict=True))
    return [states.get(info) or kept_out_state(admission) for info in listed]


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
    told = dict.fromkeys(state.reason for state in states if state.reason)
    reasons = [line for reason in told for line in wrap_text(f"- {reason}", _WIDTH)]
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
