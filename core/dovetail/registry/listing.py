"""Lists the installed plugins without importing any of them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dovetail._markers import GROUPS, HOOKS, WRAPPER_GROUP, HookName

Role: TypeAlias = Literal["compile", "collate", "accumulate", "log", "export", "wrap"]
"""The hook a plugin implements, or "wrap" for one that wraps hooks."""

ROLES: tuple[Role, ...] = (*HOOKS, "wrap")

RESERVED = ("off", "auto")
"""Names that mean something else in a config, so that nobody could choose a plugin by them."""

SESSION = "this session"
"""Stands for the distribution of a plugin that was registered by code."""

KNOWN_CONTRIB: Mapping[tuple[Role, str], str] = {
    ("log", "mlflow"): "dovetail-mlflow",
    ("export", "openvino"): "dovetail-openvino",
    ("wrap", "timing"): "dovetail-timing",
}
"""Distributions of this project that are installed apart, by what they offer."""

_DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
    "cv2": "opencv-python",
}
"""Distributions of modules that are called otherwise."""


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as its distribution declares it."""

    role: Role
    name: str
    distribution: str
    """Name of the distribution, or "this session" for one that was registered by code."""
    version: str
    value: str
    """Import path of the plugin object."""
    is_reserved: bool = False
    """Whether its name has a meaning of its own in the config, so that nobody can choose it."""
    requires: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    """Requirements of its distribution, those of extras too; `None` where nothing tells."""

    @property
    def where(self) -> str:
        """How messages name it: `plugin 'name' (distribution 1.2)`."""
        return f"plugin {self.name!r} ({self.distribution} {self.version}".rstrip() + ")"

    def is_named(self, name: str) -> bool:
        """Return whether `name`, plain or as `distribution:name`, means this plugin."""
        distribution, colon, plain = name.rpartition(":")
        if not colon:
            return name == self.name
        return plain == self.name and normalize(distribution) == normalize(self.distribution)


def normalize(distribution: str) -> str:
    """Return the comparable form of a distribution's name.

    Source: the name normalisation of the Python packaging specifications.
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def list_entry_points() -> list[PluginInfo]:
    """Return every plugin that an installed distribution declares, by role and name."""
    entries = importlib.metadata.entry_points()
    found: list[PluginInfo] = []
    owners: dict[int, tuple[str, str, tuple[str, ...] | None]] = {}
    for role in ROLES:
        group = WRAPPER_GROUP if role == "wrap" else GROUPS[role]
        for entry in entries.select(group=group):
            # Each look at a distribution's metadata reads and parses the file again.
            key = id(entry.dist)
            name, version, requires = owners[key] = owners.get(key) or _owner(entry)
            is_reserved = entry.name in RESERVED
            info = PluginInfo(role, entry.name, name, version, entry.value, is_reserved, requires)
            found.append(info)
    return sort_plugins(found)


def _owner(
    entry: importlib.metadata.EntryPoint,
) -> tuple[str, str, tuple[str, ...] | None]:
    """Return name, version and requirements of the distribution that declares an entry point.

    A folder that an interrupted installation left behind has entry points and no metadata. It
    must not keep everybody else from being listed.
    """
    headers = read_headers(entry.dist) if entry.dist is not None else {}
    name, version = (headers.get(key, [""])[0] for key in ("Name", "Version"))
    requires = tuple(headers.get("Requires-Dist", ())) if headers else None
    return name or "unknown distribution", version, requires


def read_headers(distribution: importlib.metadata.Distribution) -> dict[str, list[str]]:
    """Return the headers of a distribution's metadata, each with all its values.

    The parser of the standard library also takes apart the README that follows them, which costs
    more than all the rest of a listing.

    Source: the core metadata specifications of Python packaging; names, versions and requirements
    stand on one line each.
    """
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    headers: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line:
            break
        key, colon, value = line.partition(": ")
        if colon and not line[0].isspace():
            headers.setdefault(key, []).append(value.strip())
    return headers


def sort_plugins(plugins: Iterable[PluginInfo]) -> list[PluginInfo]:
    """Return plugins by hook, name and distribution; installation order decides nothing."""
    return sorted(plugins, key=lambda p: (ROLES.index(p.role), p.name, p.distribution))


def extra_for(distribution: str, package: str) -> str | None:
    """Return the extra of `distribution` that requires `package`, if there is one.

    Args:
        distribution: An installed distribution.
        package: Top-level module or distribution that is missing.
    """
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = normalize(distribution_of(package))
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if name and extra and normalize(name[0]) == wanted and extra[1] != "all":
            return extra[1]
    return None


def distribution_of(module: str) -> str:
    """Return the distribution that brings a top-level module, as far as names tell."""
    return _DISTRIBUTIONS.get(module, module)


def is_hook(role: Role) -> bool:
    """Return whether `role` is one of the five hooks."""
    return role != "wrap"


__all__ = [
    "KNOWN_CONTRIB",
    "RESERVED",
    "ROLES",
    "SESSION",
    "HookName",
    "PluginInfo",
    "Role",
    "distribution_of",
    "extra_for",
    "is_hook",
    "list_entry_points",
    "normalize",
    "read_headers",
    "sort_plugins",
]
