"""`dovetail plugins order`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail._markers import HOOKS, HookName
from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import admission_options, flagged_registry, json_option

if TYPE_CHECKING:
    from dovetail.preflight import CheckedConfig

_HEADER = ("ORDER", "PLUGIN", "DISTRIBUTION", "VERSION", "WHY")


@click.command()
@click.argument("hook", type=click.Choice(HOOKS), metavar="HOOK")
@click.argument("config", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@json_option
@admission_options
@debug_option
def order(hook: HookName, config: tuple[str, ...], as_json: bool) -> None:
    """Show what would run for a hook, outermost first.

    HOOK is compile, collate, accumulate, log or export. For each backend that the config names:
    the wrappers around it in the order of run.plugins, unless one asks to come before or after
    another, and the backend last. Without CONFIG, the defaults are taken. KEY=VALUE sets a field,
    as it does for train.
    """
    from dovetail.preflight import check_config

    source, overrides = _split(config)
    checked = check_config(source or {}, overrides, registry=flagged_registry())
    if hook == "collate" and checked.collator_error is not None:
        raise checked.collator_error
    chains = [list(_rows(checked, hook, name)) for name in checked.options(hook)]
    if as_json:
        names = [title.lower() for title in _HEADER]
        say(json.dumps([[dict(zip(names, r, strict=True)) for r in c] for c in chains], indent=2))
        return
    if not chains:
        say(f"Nothing runs for {hook}: {hook}.use names no backend.")
    for index, chain in enumerate(chains):
        if index:
            say()
        for line in format_columns([tuple(map(str, row)) for row in chain], _HEADER):
            say(line)


def _split(arguments: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """Tell the config, which may be left out, from the settings."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_file()):
        return None, arguments
    return Path(arguments[0]), arguments[1:]


def _rows(
    checked: CheckedConfig, hook: HookName, name: str
) -> Iterator[tuple[int, str, str, str, str]]:
    """Yield position, name, distribution, version and reason of whatever runs for a backend."""
    *wrappers, backend = checked.registry.chain(hook, name)
    named = [checked.registry.load("wrap", n) for n in checked.config.run.plugins]
    known = {wrapper.info.name for wrapper in named}
    for position, info in enumerate(wrappers, 1):
        index, wrapper = next((i, w) for i, w in enumerate(named) if w.info == info)
        why = [f"run.plugins[{index}]"]
        for word, others in (("before", wrapper.before), ("after", wrapper.after)):
            why += [f"{word} {other}" for other in others if other in known]
        yield position, info.name, info.distribution, info.version, ", ".join(why)
    yield len(wrappers) + 1, backend.name, backend.distribution, backend.version, "backend"
