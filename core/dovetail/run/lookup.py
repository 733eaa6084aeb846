"""Finds the folders of runs, those of `dovetail train` and those of a user's own loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dovetail.errors import RunError, build_message, did_you_mean
from dovetail.run.settings import CONFIG_NAME
from dovetail.run.tracking.log import LOG_NAME

LATEST = "latest"
_MAX_DEPTH = 4


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run: it holds a metric log, or is about to."""
    if (path / LOG_NAME).is_file():
        return True
    return (path / CONFIG_NAME).is_file() and (path / "plugins.lock.json").is_file()


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the folders of runs under a folder, which may be one itself; links are not followed.

    Args:
        root: Where to look, four levels deep.
    """
    yield from _walk(root, _MAX_DEPTH)


def _walk(path: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(path) as entries:
            found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError:
        return
    if LOG_NAME in found or (CONFIG_NAME in found and "plugins.lock.json" in found):
        yield path
    elif depth:
        for name in sorted(name for name, is_folder in found.items() if is_folder):
            yield from _walk(path / name, depth - 1)


def resolve_run(wanted: str, root: Path) -> Path:
    """Return the folder of the run that a user means.

    Args:
        wanted: A run's folder, its id, `name/id`, or "latest".
        root: Folder that holds all runs.

    Raises:
        RunError: There is no such run, or the id is that of several.
    """
    for path in (Path(wanted), root / wanted):
        if is_run(path):
            return path
    runs = list(find_runs(root))
    where = f"run {wanted!r}"
    if wanted == LATEST:
        if runs:
            return max(runs, key=_changed_s)
        found = f"there is no run under {str(root)!r}"
        hint = "Start one, or say where they are: --dir DIR."
        raise RunError(build_message(where, found, action=hint))
    matches = [path for path in runs if path.name == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        found = f"is the id of several: {', '.join(map(str, matches))}"
        raise RunError(build_message(where, found, "one run", "Name its folder."))
    found = f"is no run's folder, nor an id under {str(root)!r}"
    hint = (
        did_you_mean(wanted, [LATEST, *(path.name for path in runs)])
        or f"List them: dovetail runs {root}"
    )
    raise RunError(build_message(where, found, 'a folder, an id or "latest"', hint))


def _changed_s(run_dir: Path) -> float:
    for name in (LOG_NAME, CONFIG_NAME):
        with suppress(OSError):
            return (run_dir / name).stat().st_mtime
    return 0.0
