"""What can be known of a plugin without importing it, and what only importing it tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from dovetail.registry.listing import PluginInfo, normalize

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class PluginState:
    """Whether a plugin can be chosen, as far as is known."""

    text: str
    install: str | None = None
    """The line that installs what is missing."""
    reason: str | None = None
    """Why it cannot be used."""
    is_broken: bool = False


def read_state(info: PluginInfo, plugins: Sequence[PluginInfo]) -> PluginState:
    """Tell a plugin's state from the metadata of its distribution alone.

    A distribution that has an extra named like the plugin says with it what the plugin needs;
    otherwise it is what the distribution itself requires. Requirements that hold for some
    platforms only are left to the installer.

    Args:
        info: The plugin.
        plugins: All plugins, to see who else offers its name.

    Returns:
        "ready" if everything that is declared is installed, "needs <package>" if not, "not
        loaded" where there is no metadata that could tell.
    """
    if info.is_reserved:
        reason = f"the name {info.name!r} has a meaning of its own in the config"
        return PluginState("cannot be chosen", reason=reason)
    try:
        declared = _declared(info.distribution)
    except metadata.PackageNotFoundError:
        return PluginState("not loaded")
    extra = normalize(info.name)
    missing = [p for p in (*declared.get("", ()), *declared.get(extra, ())) if not _is_installed(p)]
    if missing:
        base = info.distribution
        wanted = f'"{base}[{extra}]"' if extra in declared else base
        return PluginState(f"needs {', '.join(missing)}", install=f"pip install {wanted}")
    rivals = [p for p in plugins if (p.role, p.name) == (info.role, info.name)]
    if len(rivals) > 1:
        return PluginState(f"ready as {info.distribution}:{info.name}")
    return PluginState("ready")


def load_state(info: PluginInfo) -> PluginState:
    """Import a plugin, check it, and tell what came of it."""
    from dovetail.errors import DovetailError, MissingDependencyError
    from dovetail.registry.loading import import_plugin, load_backend

    try:
        load_backend(info, import_plugin(info))
    except MissingDependencyError as err:
        return PluginState("needs a package", reason=str(err))
    except DovetailError as err:
        return PluginState("broken", reason=str(err), is_broken=True)
    return PluginState("loads")


@cache
def _declared(distribution: str) -> dict[str, list[str]]:
    """Return the packages a distribution requires by extra, those without one under ""."""
    declared: dict[str, list[str]] = {}
    for requirement in metadata.requires(distribution) or []:
        specifier, _, marker = requirement.partition(";")
        name, extra = _NAME.match(specifier.strip()), _EXTRA.fullmatch(marker.strip())
        is_certain = extra is not None or not marker.strip()
        if name and is_certain and normalize(name[0]) != normalize(distribution):
            declared.setdefault(normalize(extra[1]) if extra else "", []).append(name[0])
    return declared


@cache
def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
