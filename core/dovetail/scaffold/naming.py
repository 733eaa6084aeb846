"""The names of a new plugin, derived from one and checked before anything is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from dovetail._markers import PROJECT
from dovetail.errors import ConfigError, build_message
from dovetail.registry.listing import (
    KNOWN_CONTRIB,
    RESERVED,
    Role,
    list_entry_points,
    normalize,
)

MAX_LENGTH = 40
"""Longest backend name; a longer one would break the lines of the templates."""

_PREFIX = f"{PROJECT}-"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_EXPECTED = "lower-case letters, digits and single hyphens, a letter first"

_TAKEN = {
    **dict.fromkeys(RESERVED, "has a meaning of its own in a config"),
    **dict.fromkeys(("options", "use"), "is a key of every hook's section in a config"),
    "conformance": "would have its tests in tests/test_conformance.py, where those of its hook are",
    "plugins": f"would be the module {PROJECT}_plugins, which holds the built-in plugins",
}

_RUN_FOLDERS = ("bundle", "checkpoints")
"""What a run keeps in its folder, where a tracker writes into a folder of its own name."""


@dataclass(frozen=True)
class PluginNames:
    """What a plugin is called, and where.

    Args:
        backend: The name by which a config chooses it.
    """

    backend: str

    @classmethod
    def parse(cls, name: str, hook: Role) -> PluginNames:
        """Check the name of a new plugin.

        Args:
            name: Name of the backend, or of its distribution, `dovetail-<backend>`.
            hook: The hook it is for.

        Raises:
            ConfigError: It is no name of a distribution, means something else in a config, or
                belongs to another plugin that is installed.
        """
        backend = name.removeprefix(_PREFIX)
        if len(backend) > MAX_LENGTH:
            _refuse(name, f"has {len(backend)} characters", f"at most {MAX_LENGTH}")
        if not _NAME.fullmatch(backend):
            near = _suggest(backend)
            hint = f"Take {near!r}." if near else ""
            _refuse(name, "cannot name a distribution and a module", _EXPECTED, hint)
        if backend in _TAKEN:
            _refuse(name, _TAKEN[backend])
        if hook == "log" and backend in _RUN_FOLDERS:
            _refuse(name, "is a folder of every run, and a tracker writes into one of its own name")
        _check_is_free(name, backend, hook)
        return cls(backend)

    @property
    def distribution(self) -> str:
        """What `pip install` is told."""
        return _PREFIX + self.backend

    @property
    def module(self) -> str:
        """What `import` is told."""
        return self.distribution.replace("-", "_")

    @property
    def snake(self) -> str:
        """The backend's name in names of functions and files."""
        return self.backend.replace("-", "_")


def _check_is_free(name: str, backend: str, hook: Role) -> None:
    """Refuse a name of which a config could not say whose it is."""
    own = PluginNames(backend).distribution
    if own in KNOWN_CONTRIB.values():
        _refuse(name, f"is taken: {own} is a distribution of {PROJECT} itself")
    for plugin in list_entry_points():
        is_same = (plugin.role, plugin.name) == (hook, backend)
        if is_same and normalize(plugin.distribution) != own:
            owner = f"{plugin.distribution} {plugin.version}".rstrip()
            _refuse(name, f"is taken: the installed {owner} offers it for the hook {hook}")


def _suggest(backend: str) -> str:
    """Return a name near to one that cannot be, or nothing."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", backend).lower()
    near = re.sub(r"[\W_]+", "-", words).strip("-")
    return near if _NAME.fullmatch(near) else ""


def _refuse(name: str, found: str, expected: str = "another name", action: str = "") -> NoReturn:
    raise ConfigError(build_message(f"plugin name {name!r}", found, expected, action))
