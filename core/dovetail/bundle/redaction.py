"""Keeps this machine's folders out of what is given away."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

_FOLDERS = re.compile(r"(?<![^\s'\"(\[=,`])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"<>|]+[/\\])+")
"""The folders of an absolute path in running text; URLs and relative paths are left alone."""


def is_absolute(text: str) -> bool:
    """Return whether `text` is an absolute path on any system, or one in the home folder."""
    if "\n" in text:
        return False
    is_rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return is_rooted or text.startswith("~")


def without_folders(text: str) -> str:
    """Return `text` with each absolute path in it cut to its last part."""
    return _FOLDERS.sub("", text)


def plain_values(value: Any) -> Any:
    """Return `value` as JSON values, absolute paths in it cut to their last part."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(item) for item in value]
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str):
        return _last_part(value) if is_absolute(value) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_folders(str(value))


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name  # splits at both kinds of slash
