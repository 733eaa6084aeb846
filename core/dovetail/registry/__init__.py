"""Finds plugins by listing, imports them by name, checks them, and calls their hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.registry.listing import ROLES, PluginInfo, Role, list_entry_points

if TYPE_CHECKING:
    from dovetail.registry.calling import Registry
    from dovetail.registry.loading import Backend

__all__ = [
    "ROLES",
    "Backend",
    "PluginInfo",
    "Registry",
    "Role",
    "default_registry",
    "list_entry_points",
    "register",
]

_default: Registry | None = None


def default_registry() -> Registry:
    """Return the registry of this process, which `register` adds to."""
    global _default  # noqa: PLW0603 - one registry per process, made when it is first needed
    if _default is None:
        from dovetail.registry.calling import Registry

        _default = Registry()
    return _default


def register(plugin: object, *, hook: Role, name: str) -> None:
    """Add a plugin of this session, for scripts and notebooks.

    Args:
        plugin: A module or an instance with hookimpls.
        hook: The hook it implements, or "wrap".
        name: The name it is chosen by; an earlier one of this session is replaced.

    Raises:
        BrokenPluginError: It does not keep the contract of the hook.
    """
    default_registry().register(plugin, hook=hook, name=name)


def __getattr__(name: str) -> Any:
    # Calling and loading import pydantic; listing must not.
    if name == "Registry":
        from dovetail.registry.calling import Registry

        return Registry
    if name == "Backend":
        from dovetail.registry.loading import Backend

        return Backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
