"""`plugins.lock.json`: what took part in a run, down to the files and the options."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic_core import to_jsonable_python

from dovetail._markers import PROJECT
from dovetail._version import __version__
from dovetail.config import PluginOptions
from dovetail.errors import LockError, build_message, join_problems
from dovetail.registry.listing import SESSION, PluginInfo

Row: TypeAlias = Mapping[str, str]
"""One plugin: hook, name, distribution, version, object, files_sha256, options_sha256."""

LOCK_NAME = "plugins.lock.json"
"""Name of the file in a run's folder."""

LOCK_VERSION = 1
"""Version of the file's format."""

_IGNORED = ("__pycache__",)


def lock_row(info: PluginInfo, options: PluginOptions | None) -> dict[str, str]:
    """Return the row of a plugin; options that are equal give equal digests."""
    # An option may be an object of the session, a tokenizer say, which no file can hold.
    plain = {} if options is None else to_jsonable_python(options, fallback=lambda v: str(type(v)))
    return {
        "hook": info.role,
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "object": info.value,
        "files_sha256": files_digest(info.value) if info.distribution != SESSION else "",
        "options_sha256": _digest(plain),
    }


def core_row() -> dict[str, str]:
    """Return the row of dovetail itself, which every run depends on."""
    return {
        "hook": "core",
        "name": PROJECT,
        "distribution": PROJECT,
        "version": __version__,
        "object": PROJECT,
        "files_sha256": files_digest(PROJECT),
        "options_sha256": _digest({}),
    }


def lock_digest(rows: Sequence[Row]) -> str:
    """Return one digest of all rows."""
    return _digest([dict(row) for row in rows])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_digest(value: str) -> str:
    """Return the digest of the installed files of a plugin: of its top-level package or module.

    A wheel and an editable install of the same sources have the same digest.

    Args:
        value: Import path of the plugin object; its package is located, not imported.

    Returns:
        SHA-256 over the files' names and contents, or an empty string where there are none.
    """
    digest = hashlib.sha256()
    is_empty = True
    for name, path in sorted(_find_files(value.partition(":")[0].strip())):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{content} {name}\n".encode())
        is_empty = False
    return "" if is_empty else digest.hexdigest()


def _find_files(module: str) -> Iterator[tuple[str, Path]]:
    """Yield relative name and path of every file of the outermost package with files."""
    names = module.split(".")
    places: list[Path] | None = None
    for depth, name in enumerate(names, 1):
        spec = _find_spec(name, places)
        if spec is None:
            return
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if spec.origin is not None and spec.has_location:
            break
        if depth == len(names):  # a namespace to its end
            return
    root = Path(str(spec.origin))
    if not places:
        yield root.name, root
        return
    for path in root.parent.rglob("*"):
        if path.is_file() and not any(part in _IGNORED for part in path.parts):
            yield path.relative_to(root.parent).as_posix(), path


def _find_spec(name: str, places: list[Path] | None) -> Any:
    loaded = sys.modules.get(name) if places is None else None
    if loaded is not None and getattr(loaded, "__spec__", None) is not None:
        return loaded.__spec__
    try:
        if places is None:
            return importlib.util.find_spec(name)
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [str(place) for place in places])
    except (ImportError, ValueError):
        return None


def write_lock(rows: Sequence[Row]) -> str:
    """Return the text of `plugins.lock.json`."""
    content = {"lock_version": LOCK_VERSION, "digest": lock_digest(rows), "plugins": list(rows)}
    return json.dumps(content, indent=2) + "\n"


def read_lock(path: Path) -> list[dict[str, str]]:
    """Read a lock.

    Args:
        path: The file, or a run's folder, which holds one.

    Raises:
        LockError: It is missing, no lock, of a newer format, or was changed by hand.
    """
    file = path / LOCK_NAME if path.is_dir() else path
    where = f"lock {str(file)!r}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, digest, rows = (content[key] for key in ("lock_version", "digest", "plugins"))
    except FileNotFoundError as err:
        hint = f"Every run writes one, {LOCK_NAME}, into its folder."
        raise LockError(build_message(where, "not found", action=hint)) from err
    except OSError as err:
        raise LockError(build_message(where, f"cannot be read: {err.strerror}")) from err
    except (ValueError, KeyError, TypeError) as err:
        expected = "lock_version, digest and plugins, as a run writes them"
        raise LockError(build_message(where, "is no lock of a run", expected)) from err
    if version != LOCK_VERSION:
        hint = f"Read it with the {PROJECT} that wrote it."
        found = f"has the format {version!r}"
        raise LockError(build_message(where, found, f"{LOCK_VERSION}", hint))
    if not isinstance(rows, list) or lock_digest(rows) != digest:
        found = "its rows do not have the digest that it states"
        raise LockError(build_message(where, found, action="Take the file from the run again."))
    return rows


def compare_locks(expected: Sequence[Row], found: Sequence[Row]) -> list[str]:
    """Return what differs between two locks, one line each, in the words of a user."""
    old, new = _by_key(expected), _by_key(found)
    lines = [f"{_spell(key)} takes part, and is not in the lock" for key in new if key not in old]
    lines += [f"{_spell(key)} is in the lock, and takes no part" for key in old if key not in new]
    for key in old:
        if key in new:
            lines += [f"{_spell(key)}: {text}" for text in _differences(old[key], new[key])]
    if not lines and list(old) != list(new):
        lines.append(
            f"the order is {', '.join(k[1] for k in new)}, not {', '.join(k[1] for k in old)}"
        )
    return lines


def describe_changes(expected: Sequence[Row], found: Sequence[Row]) -> list[str]:
    """Return what became of the plugins that both locks have: other releases, other files."""
    old, new = _by_key(expected), _by_key(found)
    kept = [key for key in old if key in new]
    return [
        f"{_spell(key)}: {text}"
        for key in kept
        for text in _differences(
            {**old[key], "options_sha256": ""}, {**new[key], "options_sha256": ""}
        )
    ]


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    return {(row.get("hook", ""), row.get("name", "")): row for row in rows}


def _spell(key: tuple[str, str]) -> str:
    hook, name = key
    return PROJECT if hook == "core" else f"{hook} plugin {name!r}"


def _differences(old: Row, new: Row) -> Iterator[str]:
    for key in ("distribution", "version", "object"):
        if old.get(key) != new.get(key):
            yield f"{key} was {old.get(key)}, is {new.get(key)}"
    is_same_release = all(old.get(k) == new.get(k) for k in ("distribution", "version"))
    if is_same_release and old.get("files_sha256") != new.get("files_sha256"):
        yield f"the files of {new.get('distribution')} {new.get('version')} were changed"
    if old.get("options_sha256") != new.get("options_sha256"):
        yield "its options differ"


def check_lock(expected: Sequence[Row], found: Sequence[Row], where: str) -> None:
    """Refuse to run with anything but what a lock names.

    Args:
        expected: Rows of the lock.
        found: Rows of this run.
        where: The lock, for messages.

    Raises:
        LockError: They differ; the message says in what.
    """
    differences = compare_locks(expected, found)
    if differences:
        hint = "Install what the lock names, or run without it."
        if len(differences) == 1:
            raise LockError(build_message(where, differences[0], action=hint))
        raise LockError(f"{join_problems(where, differences)}\n{hint}")
