"""Finds the plugin that a name means, or says why there is none and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.errors import PluginConflictError, UnknownPluginError, build_message, did_you_mean
from dovetail.registry.listing import KNOWN_CONTRIB, PluginInfo, Role


def find_plugin(
    role: Role,
    name: str,
    admitted: Sequence[PluginInfo],
    installed: Sequence[PluginInfo],
    reason: str,
) -> PluginInfo:
    """Return the plugin that `name`, plain or as `distribution:name`, means.

    Args:
        role: Its hook, or "wrap".
        name: What the config says.
        admitted: Plugins of every role that may be seen.
        installed: All that are installed, for a better message.
        reason: What keeps the others out.

    Raises:
        UnknownPluginError: There is none; the message lists the choices and the nearest.
        PluginConflictError: Two distributions offer the name.
    """
    candidates = [p for p in admitted if p.role == role]
    matches = [p for p in candidates if p.is_named(name)]
    where = "config run.plugins" if role == "wrap" else f"config {role}.use"
    if len(matches) > 1:
        owners = [f"{p.distribution} {p.version}" for p in matches]
        choice = " or ".join(f'"{p.distribution}:{p.name}"' for p in matches)
        found = f"{name!r} is offered by {' and by '.join(owners)}"
        raise PluginConflictError(build_message(where, found, "one of them", f"Write {choice}."))
    if matches:
        return matches[0]
    choices = [p.name for p in candidates]
    kept_out = [p for p in installed if p.role == role and p.is_named(name)]
    contrib = KNOWN_CONTRIB.get((role, name.rpartition(":")[2]))
    if kept_out:
        hint = f"{kept_out[0].distribution} offers it; {reason} keeps it out. Allow it there."
    elif contrib:
        hint = f"Install it: pip install {contrib}"
    else:
        hint = did_you_mean(name, choices) or _elsewhere(name, admitted)
    hint = hint or f"Install a plugin that offers it; `dovetail plugins {role}` lists them."
    expected = f"one of {', '.join(dict.fromkeys(choices)) or '(none is installed)'}"
    found = f"no plugin is called {name!r}"
    raise UnknownPluginError(build_message(where, found, expected, hint))


def _elsewhere(name: str, admitted: Sequence[PluginInfo]) -> str:
    roles = [p.role for p in admitted if p.is_named(name)]
    if roles[:1] == ["wrap"]:
        return f"{name!r} wraps hooks: name it in run.plugins."
    return f"{name!r} is a plugin of the {roles[0]} hook." if roles else ""
