"""Renders the templates of a hook into a folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

from dovetail._markers import API_VERSION, GROUPS, PROJECT, WRAPPER_GROUP
from dovetail._version import __version__
from dovetail.errors import ConfigError, build_message
from dovetail.registry.listing import ROLES, Role
from dovetail.scaffold.naming import PluginNames

_TEMPLATES = Path(__file__).parent / "templates"

_COMMON = {
    ".github/workflows/ci.yml": "ci.yml",
    ".gitignore": "gitignore",
    "README.md": "README.md",
    "pyproject.toml": "pyproject.toml",
    "src/$module/py.typed": "py.typed",
    "tox.ini": "tox.ini",
}
"""Files that are alike for every hook, and their templates."""

_OF_HOOK = {
    "src/$module/__init__.py": "plugin.py",
    "tests/test_conformance.py": "test_conformance.py",
    "tests/test_$snake.py": "test_plugin.py",
}
"""Files that every hook has its own template of."""


def write_plugin(name: str, hook: Role, parent: Path) -> Path:
    """Write the distribution of a new plugin, one that works.

    Args:
        name: What a config will call it, `scaled`, or its distribution, `dovetail-scaled`.
        hook: The hook it implements, or "wrap" for one that wraps hooks.
        parent: Existing folder to write it into.

    Returns:
        The new folder, `parent/dovetail-<name>`.

    Raises:
        ConfigError: The name cannot be used, there is no such hook, the folder has files already,
            or it cannot be written. Nothing was written then.
    """
    if hook not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        raise ConfigError(build_message("argument hook", f"got {hook!r}", expected))
    names = PluginNames.parse(name, hook)
    target = parent / names.distribution
    where = f"folder {str(target)!r}"
    try:
        _check_is_empty(target, where)
        _write_whole(target, dict(_render(names, hook)))
    except OSError as err:
        reason = err.strerror or str(err)
        raise ConfigError(build_message(where, f"cannot be written: {reason}")) from err
    return target


def config_example(names: PluginNames, hook: Role) -> str:
    """Return the lines of a config, in TOML, that choose a new plugin and set its options."""
    return _fill(_TEMPLATES / hook / "config.toml.template", _values(names, hook))


def _render(names: PluginNames, hook: Role) -> Iterator[tuple[str, str]]:
    """Yield path and text of every file."""
    values = _values(names, hook)
    plugin = _fill(_TEMPLATES / hook / "plugin.py.template", values)
    values["description"] = plugin.partition("\n")[0].strip('".')  # first line of its docstring
    values["config"] = config_example(names, hook).strip()
    values["about"] = _fill(_TEMPLATES / hook / "about.md.template", values).strip()
    for templates, folder in ((_COMMON, "common"), (_OF_HOOK, hook)):
        for path, template in templates.items():
            text = _fill(_TEMPLATES / folder / f"{template}.template", values)
            yield Template(path).substitute(values), text


def _values(names: PluginNames, hook: Role) -> dict[str, str]:
    # A local part such as `+cpu` names a build, and no requirement may hold one.
    version = __version__.partition("+")[0]
    return {
        "api": str(API_VERSION),
        "backend": names.backend,
        "distribution": names.distribution,
        "group": WRAPPER_GROUP if hook == "wrap" else GROUPS[hook],
        "module": names.module,
        "requirement": f"{PROJECT}>={version}",
        "snake": names.snake,
        "testing_requirement": f"{PROJECT}[testing]>={version}",
    }


def _fill(template: Path, values: Mapping[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _check_is_empty(target: Path, where: str) -> None:
    if not target.parent.is_dir():
        found = f"{str(target.parent)!r} is no folder"
        raise ConfigError(build_message(where, found, "an existing folder to write it into"))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(build_message(where, "is there already, and is no folder"))
    if target.is_dir() and any(target.iterdir()):
        hint = "Remove it, or write the plugin elsewhere; nothing is overwritten."
        raise ConfigError(build_message(where, "has files in it", "a new folder", hint))


def _write_whole(target: Path, texts: Mapping[str, str]) -> None:
    """Write beside `target` and rename, so that a failure leaves nothing half-made."""
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # A folder of its own in the temporary one, which nobody but its owner may enter.
        whole = beside / target.name
        for path, text in texts.items():
            file = whole / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        if target.exists():
            target.rmdir()  # empty; Windows renames onto nothing
        os.rename(whole, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
