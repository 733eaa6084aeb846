"""Reads a config from a file, a mapping and overrides."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dovetail.config.problems import explain
from dovetail.config.sections import TrainingConfig
from dovetail.errors import ConfigError, build_message, join_problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE_WORD = re.compile(r"([^\W\d]|[./~])[\w.:/@+~-]*")
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a TOML file, or a JSON file by its ending.

    Args:
        path: The file.

    Returns:
        The plain tables.

    Raises:
        ConfigError: It is missing, a folder, not UTF-8, or not TOML or JSON.
    """
    where = f"config file {str(path)!r}"
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors write a byte-order mark
    except FileNotFoundError as err:
        beside = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"Beside it: {', '.join(beside)}." if beside else "Check the path."
        raise ConfigError(build_message(where, "not found", "a TOML or JSON file", hint)) from err
    except IsADirectoryError as err:
        hint = "Name the file in it."
        raise ConfigError(build_message(where, "is a folder", "a file", hint)) from err
    except UnicodeDecodeError as err:
        found = f"is not UTF-8 (byte {err.object[err.start]:#04x} at offset {err.start})"
        hint = "Save the file as UTF-8."
        raise ConfigError(build_message(where, found, "UTF-8 text", hint)) from err
    except OSError as err:
        raise ConfigError(build_message(where, f"cannot be read: {err.strerror}")) from err
    return _parse(text, where, is_json=path.suffix.lower() == ".json")


def _parse(text: str, where: str, *, is_json: bool) -> dict[str, Any]:
    data: Any
    try:
        data = json.loads(text) if is_json else tomllib.loads(text)
    except json.JSONDecodeError as err:
        found = f"is not JSON: {err.msg} at line {err.lineno}, column {err.colno}"
        raise ConfigError(build_message(where, found, action="Mend that line.")) from err
    except tomllib.TOMLDecodeError as err:
        found = f"is not TOML: {err}"
        raise ConfigError(build_message(where, found, action="Mend that line.")) from err
    if not isinstance(data, dict):
        found = f"holds a {type(data).__name__}"
        raise ConfigError(build_message(where, found, "an object with one key per section"))
    tables: dict[str, Any] = data
    if is_json:
        tables.pop("$schema", None)  # for editors; a TOML file says it in a comment
    return tables


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `data` with `section.key=value` settings applied, values read as TOML.

    A bare word or path that is no TOML value is taken as a string, so that `train.optimizer=sgd`
    needs no quotes inside quotes.

    Args:
        data: Plain tables; left as they are.
        overrides: Settings such as `train.lr=3e-4` or `log.use=["tensorboard"]`.

    Returns:
        New tables.

    Raises:
        ConfigError: A setting has no `=`, no path, or a value that is not TOML; all of them in
            one message.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    result: dict[str, Any] = _copy(data)
    problems: list[str] = []
    for override in overrides:
        key, sign, raw = override.partition("=")
        if not sign or not _KEY.fullmatch(key.strip()):
            expected = "section.key=value, such as train.lr=3e-4"
            problems.append(build_message(f"override {override!r}", "is no setting", expected))
            continue
        try:
            value = _read_value(raw.strip())
        except ValueError:
            expected = 'a TOML value: 3, 3e-4, true, "text", ["a", "b"]'
            hint = "Quote it for the shell, as in 'log.use=[\"tensorboard\"]'."
            problems.append(build_message(f"override {key}", f"got {raw!r}", expected, hint))
            continue
        problem = _set(result, key.strip().split("."), value)
        if problem:
            problems.append(problem)
    if problems:
        raise ConfigError(join_problems("overrides", problems), problems)
    return result


def _read_value(raw: str) -> Any:
    try:
        tables: dict[str, Any] = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        if _BARE_WORD.fullmatch(raw):
            return raw
        raise
    if len(tables) > 1:
        raise ValueError("more than one setting")
    return tables["value"]


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> str:
    for depth, part in enumerate(path[:-1]):
        child = table.setdefault(part, {})
        if not isinstance(child, dict):
            where = f"override {'.'.join(path)}"
            return build_message(where, f"{'.'.join(path[: depth + 1])} is {child!r}", "a table")
        table = child
    table[path[-1]] = value
    return ""


def parse_config(data: Mapping[str, Any]) -> tuple[TrainingConfig | None, list[str]]:
    """Validate plain tables.

    Returns:
        The config, or `None` and every problem found.
    """
    try:
        return TrainingConfig.model_validate(dict(data)), []
    except ValidationError as err:
        return None, explain(err, TrainingConfig, "config")
