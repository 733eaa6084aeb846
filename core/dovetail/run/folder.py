"""A run's folder: made once, never overwritten, found again for a resume."""

from __future__ import annotations

import secrets
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from dovetail.config import RunConfig, TrainingConfig, parse_config, read_config_file
from dovetail.errors import (
    CheckpointError,
    ConfigError,
    LockError,
    RunError,
    build_message,
    join_problems,
)
from dovetail.registry.lock import LOCK_NAME, Row, describe_changes, read_lock, write_lock

_CONFIG = "config.toml"


def create_run_folder(config: TrainingConfig, lock: Sequence[Row]) -> Path:
    """Make the folder of a new run, with its config and the plugins it uses.

    Args:
        config: The resolved config.
        lock: Rows of `plugins.lock.json`.

    Returns:
        `dir/name/id`.

    Raises:
        ConfigError: The config holds something that a file cannot.
        RunError: The folder exists already, or cannot be written; nothing is left behind then.
    """
    run = config.run
    identity = run.id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    path = run.dir / run.name / identity
    where = f"run folder {str(path)!r}"
    files = {
        _CONFIG: _to_toml(config),
        LOCK_NAME: write_lock(lock),
    }
    try:
        path.mkdir(parents=True)
    except FileExistsError as err:
        hint = f"Choose another run.id, or go on with it: --resume {path}"
        raise RunError(build_message(where, "exists already", "a new folder", hint)) from err
    except OSError as err:
        found = f"cannot be made: {err.strerror}"
        raise RunError(build_message(where, found, action="Choose another run.dir.")) from err
    try:
        for name, text in files.items():
            (path / name).write_text(text, encoding="utf-8")
    except OSError as err:
        shutil.rmtree(path, ignore_errors=True)
        found = f"cannot be written: {err.strerror}"
        hint = "Free space or choose another run.dir."
        raise RunError(build_message(where, found, action=hint)) from err
    return path


def rewrite_config(path: Path, config: TrainingConfig) -> None:
    """Put the config that a run goes on with in place of the one that it began with.

    Raises:
        ConfigError: The config holds something that a file cannot.
        RunError: The file cannot be written; the old one is whole.
    """
    text, aside = _to_toml(config), path / f".{_CONFIG}.partial"
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path / _CONFIG)
    except OSError as err:
        found = f"cannot be written: {err.strerror}"
        where = f"run folder {str(path)!r}"
        raise RunError(build_message(where, found, action="Free space.")) from err


def _to_toml(config: TrainingConfig) -> str:
    try:
        return tomli_w.dumps(config.to_dict())
    except TypeError as err:
        hint = "Leave null out of lists."
        raise ConfigError(build_message("config", f"is no TOML: {err}", action=hint)) from err


def find_run(run: RunConfig, wanted: str | Path) -> Path:
    """Return the folder of a run to go on with.

    Args:
        run: The config's `run` section.
        wanted: A run's folder, an id under `dir/name`, or "latest".

    Raises:
        CheckpointError: There is no such run.
    """
    home = run.dir / run.name
    if str(wanted) == "latest":
        paths = [p.parent for p in home.glob(f"*/{_CONFIG}")]
        runs = sorted(paths, key=lambda p: (p / _CONFIG).stat().st_mtime)
        if runs:
            return runs[-1]
        found = f"there is no run under {str(home)!r}"
        raise CheckpointError(build_message("resume 'latest'", found, action="Start one first."))
    for path in (Path(wanted), home / wanted):
        if (path / _CONFIG).is_file():
            return path
    found = f"is no run's folder, nor an id under {str(home)!r}"
    raise CheckpointError(build_message(f"resume {str(wanted)!r}", found, "a folder of a run"))


def check_same_run(
    config: TrainingConfig, lock: Sequence[Row], path: Path, fixed: Sequence[str]
) -> None:
    """Refuse to go on with settings that would make another run of it; warn of other plugins.

    Args:
        config: The config to go on with.
        lock: The plugins to go on with.
        path: The run's folder.
        fixed: Dotted prefixes of settings that must be as they were.

    Raises:
        CheckpointError: Some of them differ; the message names each.
    """
    saved, problems = parse_config(read_config_file(path / _CONFIG))
    if saved is None:
        where = f"resume {str(path)!r}"
        found = f"its {_CONFIG} does not fit: {join_problems('problems', problems)}"
        raise CheckpointError(build_message(where, found))
    old, new = saved.to_flat_dict(), config.to_flat_dict()
    differences = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if key.startswith(tuple(fixed)) and old.get(key) != new.get(key)
    ]
    if differences:
        hint = "Resume with the settings it began with, or start a new run."
        where = f"resume {str(path)!r}"
        raise CheckpointError(build_message(where, "; ".join(differences), action=hint))
    try:
        changes = describe_changes(read_lock(path), lock)
    except LockError as err:  # no reason to lose a run
        changes = [str(err)]
    if changes:
        found = f"has begun with other plugins: {'; '.join(changes)}"
        hint = "It may go on differently; --frozen refuses that."
        warnings.warn(build_message(f"resume {str(path)!r}", found, action=hint), stacklevel=4)
