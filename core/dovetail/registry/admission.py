"""Which installed distributions may offer plugins: all of them, or those of a list."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dovetail._markers import PROJECT
from dovetail.errors import ConfigError, build_message, did_you_mean
from dovetail.registry.listing import SESSION, PluginInfo, normalize

AUTOLOAD_VARIABLE = "DOVETAIL_PLUGIN_AUTOLOAD"
ALLOW_VARIABLE = "DOVETAIL_PLUGIN_ALLOW"

_SWITCH = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


@dataclass(frozen=True)
class Admission:
    """Who may offer plugins. What is `None` is not decided here.

    dovetail's own plugins and those of this session are always in.
    """

    autoload: bool | None = None
    """Whether every installed distribution is in; without it only those of `allow` are."""
    allow: tuple[str, ...] | None = None
    """Distributions, or `distribution:name`, that are in; all others are out."""
    autoload_source: str = f"config run.{AUTOLOAD_VARIABLE.removeprefix('DOVETAIL_').lower()}"
    """Who decided about `autoload`, for messages."""
    allow_source: str = f"config run.{ALLOW_VARIABLE.removeprefix('DOVETAIL_').lower()}"
    """Who decided about `allow`, for messages."""

    def over(self, other: Admission) -> Admission:
        """Return what this and, where it decides nothing, `other` says."""
        autoload = self if self.autoload is not None else other
        allow = self if self.allow is not None else other
        return Admission(
            autoload.autoload, allow.allow, autoload.autoload_source, allow.allow_source
        )

    def admits(self, info: PluginInfo) -> bool:
        """Return whether a plugin may be seen."""
        owner = normalize(info.distribution)
        if owner in (PROJECT, SESSION):
            return True
        if self.allow is None:
            return self.autoload is not False
        return any(_names(entry) in ((owner, ""), (owner, info.name)) for entry in self.allow)

    def reason(self) -> str:
        """Return which setting keeps others out."""
        return self.autoload_source if self.allow is None else self.allow_source

    def check(self, plugins: Iterable[PluginInfo]) -> None:
        """Check that everything on the list exists.

        Args:
            plugins: All that is installed.

        Raises:
            ConfigError: The list names what no distribution offers.
        """
        known = list(plugins)
        problems = [self._describe(e, known) for e in self.allow or () if not _exists(e, known)]
        if problems:
            raise ConfigError("\n".join(problems), problems)

    def _describe(self, entry: str, plugins: list[PluginInfo]) -> str:
        choices = sorted({p.distribution for p in plugins} - {PROJECT})
        expected = f"a distribution with plugins ({', '.join(choices) or 'none is installed'})"
        owners = sorted({p.distribution for p in plugins if p.name == entry})
        hint = did_you_mean(entry, choices)
        if owners:
            hint = f"{entry!r} is a plugin of {' and '.join(owners)}; write {owners[0]!r}."
        found = f"no installed distribution offers {entry!r}"
        return build_message(self.allow_source, found, expected, hint)


def read_environment() -> Admission:
    """Return what the environment variables say.

    Raises:
        ConfigError: `DOVETAIL_PLUGIN_AUTOLOAD` is neither on nor off.
    """
    switch, names = os.environ.get(AUTOLOAD_VARIABLE, ""), os.environ.get(ALLOW_VARIABLE)
    autoload = _SWITCH.get(switch.strip().lower()) if switch.strip() else None
    if switch.strip() and autoload is None:
        expected = f"one of {', '.join(_SWITCH)}"
        where = f"environment variable {AUTOLOAD_VARIABLE}"
        raise ConfigError(build_message(where, f"got {switch!r}", expected))
    allow = None
    if names is not None:
        allow = tuple(name.strip() for name in names.split(",") if name.strip())
    variables = [f"environment variable {name}" for name in (AUTOLOAD_VARIABLE, ALLOW_VARIABLE)]
    return Admission(autoload, allow, *variables)


def _names(entry: str) -> tuple[str, str]:
    distribution, _, name = entry.partition(":")
    return normalize(distribution.strip()), name.strip()


def _exists(entry: str, plugins: Iterable[PluginInfo]) -> bool:
    distribution, name = _names(entry)
    owned = [p.name for p in plugins if normalize(p.distribution) == distribution]
    return name in owned if name else bool(owned)


def option_sources(settings: Mapping[str, object]) -> Admission:
    """Return what options of the command line say: `autoload` and `allow`."""
    autoload, allow = settings.get("autoload"), settings.get("allow")
    names = tuple(str(a) for a in allow) if isinstance(allow, tuple) and allow else None
    switch = autoload if isinstance(autoload, bool) else None
    return Admission(switch, names, "option --no-autoload", "option --allow")
