"""The marks a plugin carries and the entry-point groups it is found in."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import pluggy

PROJECT: Final = "dovetail"
"""Name that ties hookspecs, hookimpls and plugin managers together."""

API_VERSION: Final = 1
"""Version of the contract between the core and its plugins (`dovetail_api`)."""

OLDEST_API_VERSION: Final = 1
"""Oldest contract whose plugins this core still takes."""

HookName: TypeAlias = Literal["compile", "collate", "accumulate", "log", "export"]

HOOKS: Final[tuple[HookName, ...]] = ("compile", "collate", "accumulate", "log", "export")
"""The five hooks in the order in which a run calls them."""

GROUPS: Final[dict[HookName, str]] = {hook: f"{PROJECT}.{hook}" for hook in HOOKS}
"""Entry-point group of each hook."""

WRAPPER_GROUP: Final = f"{PROJECT}.plugins"
"""Entry-point group of plugins that wrap hooks; they act only if `[run] plugins` names them."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def hook_function(hook: HookName) -> str:
    """Return the name of the function that implements `hook`, `dovetail_<hook>`."""
    return f"{PROJECT}_{hook}"
