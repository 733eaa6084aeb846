"""Options that several commands take: JSON, and which distributions may offer plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dovetail.registry.admission import Admission, option_sources, read_environment

if TYPE_CHECKING:
    from dovetail.registry import Registry

_Command = TypeVar("_Command", bound=Callable[..., Any])

# A group and its commands take the same options, and one context's `meta` is the other's too.
_PREFIX = "dovetail.cli."
_ADMISSION = f"{_PREFIX}admission"


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    key = f"{_PREFIX}{param.name}"
    ctx.meta[key] = value or ctx.meta.get(key, False)
    return bool(ctx.meta[key])


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember, help="Print JSON."
)
check_option = click.option(
    "--check",
    is_flag=True,
    callback=_remember,
    help="Import every listed plugin, each in a process of its own, and say which are broken.",
)


def _store_autoload(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta.setdefault(_ADMISSION, {})["autoload"] = False


def _store_allow(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
    if value:
        settings = ctx.meta.setdefault(_ADMISSION, {})
        settings["allow"] = (*settings.get("allow", ()), *value)


def admission_options(command: _Command) -> _Command:
    """Add `--no-autoload` and `--allow`, which `flagged_admission` reads."""
    autoload = click.option(
        "--no-autoload",
        is_flag=True,
        expose_value=False,
        callback=_store_autoload,
        help="Only dovetail's own plugins, and those of --allow.",
    )
    allow = click.option(
        "--allow",
        multiple=True,
        metavar="DIST",
        expose_value=False,
        callback=_store_allow,
        help="Only dovetail's own plugins and those of this distribution; may be repeated.",
    )
    return autoload(allow(command))


def flagged_admission() -> Admission:
    """Return what the options of the command under way say, and beside them the environment.

    Raises:
        ConfigError: A variable of the environment is neither on nor off.
    """
    return _flags().over(read_environment())


def flagged_registry() -> Registry | None:
    """Return the registry that the options ask for; without any, `None` for the usual one."""
    if _ADMISSION not in click.get_current_context().meta:
        return None
    from dovetail.registry import Registry

    return Registry(admission=_flags())


def spell_admission() -> list[str]:
    """Return the options as they were given, for a command that is to be repeated."""
    flags = _flags()
    words = ["--no-autoload"] if flags.autoload is False else []
    return words + [word for name in flags.allow or () for word in ("--allow", name)]


def _flags() -> Admission:
    return option_sources(click.get_current_context().meta.get(_ADMISSION, {}))
