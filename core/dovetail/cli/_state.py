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

    Requirements that hold for some platforms only are left to the installer.

    Args:
        info: The plugin.
        plugins: All plugins, to see who else offers its name.

    Returns:
        "ready" if everything that is declared is installed; "needs <package>" if the distribution
        requires what is not; "may need <package>" if only its extra of the plugin's name does, for
        that is where a plugin's own packages are declared, the optional ones too; "not loaded"
        where there is no metadata that could tell.
    """
    if info.is_reserved:
        reason = f"the name {info.name!r} has a meaning of its own in the config"
        return PluginState("cannot be chosen", reason=reason)
    try:
        declared = _declared(info.distribution)
    except metadata.PackageNotFoundError:
        return PluginState("not loaded")
    extra = normalize(info.name)
    if missing := _missing(declared.get("", [])):
        install = f"pip install {info.distribution}"
        return PluginState(f"needs {', '.join(missing)}", install=install)
    if missing := _missing(declared.get(extra, [])):
        install = f'pip install "{info.distribution}[{extra}]"'
        return PluginState(f"may need {', '.join(missing)}", install=install)
    rivals = [p for p in plugins if (p.role, p.name) == (info.role, info.name)]
    if len(rivals) > 1:
        return PluginState(f"ready as {info.distribution}:{info.name}")
    return PluginState("ready")


def list_extra(info: PluginInfo) -> list[str]:
    """Return the packages in the extra that is named like a plugin."""
    try:
        return _declared(info.distribution).get(normalize(info.name), [])
    except metadata.PackageNotFoundError:
        return []


def load_state(info: PluginInfo) -> PluginState:
    """Import a plugin, check it, and tell what came of it."""
    from dovetail.errors import MissingDependencyError
    from dovetail.registry.loading import import_plugin, load_backend

    try:
        load_backend(info, import_plugin(info))
    except MissingDependencyError as err:
        package = getattr(err.__cause__, "name", None) or "a package"
        return PluginState(f"needs {package}", reason=str(err))
    except Exception as err:
        reason = str(err) if info.where in str(err) else f"{info.where}: {err!r}"
        return PluginState("broken", reason=reason, is_broken=True)
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


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if not _is_installed(package)]


@cache
def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
