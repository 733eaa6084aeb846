"""The settings of a run as they stand in its folder, and how those of several runs differ."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.reading import parse_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_NAME = "config.toml"

MONITOR = ("val/loss", "min")
"""Metric that decides which step was best, and its mode, where a run's settings name none."""


def read_config_text(run_dir: Path) -> str | None:
    """Return a run's `config.toml`, or `None` where there is none that can be read."""
    try:
        return (run_dir / CONFIG_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def parse_settings(text: str | None) -> dict[str, Any]:
    """Return the settings of a `config.toml` by their dotted names; of a damaged one, none."""
    try:
        return flatten(tomllib.loads(text or ""))
    except tomllib.TOMLDecodeError:
        return {}


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Return a run's settings by their dotted names: of its config, else of its metric log."""
    settings = parse_settings(read_config_text(run_dir))
    if settings:
        return settings
    try:
        with (run_dir / LOG_NAME).open("rb") as file:
            record = parse_record(file.readline()) or {}
    except OSError:
        return {}
    params = record.get("params")
    return params if isinstance(params, dict) else {}


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def find_monitor(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the metric that decides which step is best, and whether "min" or "max" is."""
    name = settings.get("train.monitor", MONITOR[0])
    mode = settings.get("train.monitor_mode", MONITOR[1])
    return str(name), "max" if mode == "max" else "min"


def find_differences(all_settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return what the runs do not have in common.

    Args:
        all_settings: Settings by dotted name, of each run.

    Returns:
        Name to the runs' values, `None` for a run without it; sorted by name.
    """
    names = sorted({name for settings in all_settings for name in settings})
    rows = {name: [settings.get(name) for settings in all_settings] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row[1:])}
