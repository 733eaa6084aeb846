"""What can be known of a plugin without importing it, and what its import told."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from dovetail._markers import PROJECT
from dovetail.cli._console import complain
from dovetail.registry.listing import PluginInfo, normalize

if TYPE_CHECKING:
    from dovetail.registry.admission import Admission
    from dovetail.registry.probe import Probed

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
    missing: tuple[str, ...] = ()
    """Packages that are declared and not installed."""


def read_state(info: PluginInfo, *, is_shared: bool = False) -> PluginState:
    """Tell a plugin's state from the metadata of its distribution alone.

    Requirements that hold for some platforms only are left to the installer.

    Args:
        info: The plugin.
        is_shared: Whether another distribution offers its name too.

    Returns:
        "ready" if everything that is declared is installed; "needs <package>" if the distribution
        requires what is not; "may need <package>" if only its extra of the plugin's name does, for
        that is where a plugin's own packages are declared, the optional ones too; "not loaded"
        where there is no metadata that could tell.
    """
    if info.is_reserved:
        reason = f"{info.where}: its name has a meaning of its own in the config"
        return PluginState("cannot be chosen", reason=reason)
    if info.requires is None:
        return PluginState("not loaded")
    declared = _declared(info)
    extra = normalize(info.name)
    if missing := _missing(declared.get("", [])):
        install = f"pip install {info.distribution}"
        return PluginState(f"needs {', '.join(missing)}", install, missing=tuple(missing))
    if missing := _missing(declared.get(extra, [])):
        install = f'pip install "{info.distribution}[{extra}]"'
        return PluginState(f"may need {', '.join(missing)}", install, missing=tuple(missing))
    if is_shared:
        return PluginState(f"ready as {info.distribution}:{info.name}")
    return PluginState("ready")


def list_requirements(info: PluginInfo) -> list[str]:
    """Return the packages that a plugin's distribution requires beside dovetail."""
    return [p for p in _declared(info).get("", []) if normalize(p) != PROJECT]


def list_extra(info: PluginInfo) -> list[str]:
    """Return the packages in the extra that is named like a plugin."""
    return _declared(info).get(normalize(info.name), [])


def probed_state(probed: Probed) -> PluginState:
    """Tell a plugin's state from what came of its import."""
    if probed.outcome == "loads":
        return PluginState("loads")
    if probed.outcome == "needs":
        return PluginState(f"needs {probed.package}", reason=probed.reason)
    text = {"ended": "ends the process", "timed out": "never ends"}.get(probed.outcome, "broken")
    return PluginState(text, reason=probed.reason, is_broken=True)


def kept_out_state(admission: Admission) -> PluginState:
    """Tell the state of a plugin that may not be seen."""
    return PluginState("kept out", reason=f"kept out by the {admission.reason()}")


def probe(
    plugins: Sequence[PluginInfo], timeout_s: float | None = None
) -> dict[PluginInfo, Probed]:
    """Import plugins, each in a process of its own, and say so where somebody waits.

    Args:
        plugins: Who is imported.
        timeout_s: Seconds that each gets.
    """
    from dovetail.registry.probe import TIMEOUT_S, probe_plugins

    if plugins and sys.stderr.isatty():
        complain(f"importing {len(plugins)} plugins, each in a process of its own ...")
    return dict(zip(plugins, probe_plugins(plugins, timeout_s or TIMEOUT_S), strict=True))


def _declared(info: PluginInfo) -> dict[str, list[str]]:
    """Return the packages a plugin's distribution requires by extra, those without one under ""."""
    declared: dict[str, list[str]] = {}
    for requirement in info.requires or ():
        specifier, _, marker = requirement.partition(";")
        name, extra = _NAME.match(specifier.strip()), _EXTRA.fullmatch(marker.strip())
        is_certain = extra is not None or not marker.strip()
        if name and is_certain and normalize(name[0]) != normalize(info.distribution):
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
