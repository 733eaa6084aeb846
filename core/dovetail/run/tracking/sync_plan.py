"""Which trackers a run that is over is handed to, from its config and what the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.config import TrainingConfig, apply_overrides, parse_config, read_config_file
from dovetail.errors import (
    ConfigError,
    DovetailError,
    build_message,
    did_you_mean,
    join_problems,
)
from dovetail.registry import PluginInfo, Registry, default_registry
from dovetail.registry.admission import Admission
from dovetail.run.settings import CONFIG_NAME, flatten
from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.reading import parse_record
from dovetail.types import RunInfo, Tracker

_PLUGIN_FIELDS = ("plugins", "plugin_autoload", "plugin_allow")
"""Fields of `[run]` that decide which plugins take part."""

_OWN_LOOP = "metrics"
"""Name of a run that has no config, as `MetricsTracker` calls it."""


@dataclass(frozen=True)
class SyncPlan:
    """Trackers to make, and how they are fed."""

    makers: Mapping[str, Callable[[], Tracker]]
    """What makes each tracker, by name."""
    changed: frozenset[str]
    """Those whose own options are others than in the run."""
    flush_s: float
    calls_per_s: float | None


def plan_sync(
    directory: Path,
    names: Sequence[str],
    overrides: Sequence[str],
    registry: Registry | None,
) -> SyncPlan:
    """Return the trackers of a run, loaded and their options checked, none of them made.

    Args:
        directory: The run's folder.
        names: Trackers in place of those of the config.
        overrides: Settings of `log` and of the plugins in `run`.
        registry: Where trackers come from; the process's own without it.

    Raises:
        ConfigError: No tracker is named, or a setting does not fit.
        PluginError: A tracker is unknown or broken.
    """
    tables = _read_tables(directory)
    config = _parse(directory, apply_overrides(_relevant_part(tables), overrides))
    run, settings = config.run, config.log
    registry = (registry or default_registry()).with_wrappers(
        run.plugins, Admission(run.plugin_autoload, run.plugin_allow)
    )
    registry.list_plugins()  # an error in the list of who may be seen comes first
    chosen = _choose(registry, settings.names, names, directory)
    changed = _check_overrides(overrides, chosen)
    tables_by_name = {name: settings.options.get(_bare(name), {}) for name in chosen}
    begun = _read_begin(directory)
    config_dir = Path(begun["config_dir"]) if "config_dir" in begun else None
    options = {
        n: registry.build_options("log", n, t, config_dir) for n, t in tables_by_name.items()
    }
    params = flatten(tables) if tables else begun.get("params", {})
    name = run.name if tables else _OWN_LOOP
    info = RunInfo(name, directory.resolve().name, directory, params)
    return SyncPlan(
        {name: partial(registry.log, name, info, made) for name, made in options.items()},
        frozenset(name for name in chosen if _bare(name) in changed),
        settings.flush_s,
        settings.calls_per_s,
    )


def _read_tables(directory: Path) -> dict[str, Any]:
    """Return the run's config as plain tables; none for a loop of the user's own."""
    path = directory / CONFIG_NAME
    return read_config_file(path) if path.exists() else {}


def _relevant_part(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what another version may know differently and no tracker is made of."""
    run, log = tables.get("run", {}), tables.get("log", {})
    if isinstance(run, Mapping):
        run = {key: value for key, value in run.items() if key in ("name", *_PLUGIN_FIELDS)}
    return {"run": run, "log": log}


def _parse(directory: Path, tables: Mapping[str, Any]) -> TrainingConfig:
    config, problems = parse_config(tables)
    if config is None:
        title = f"config {str(directory / CONFIG_NAME)!r}"
        raise ConfigError(join_problems(title, problems), problems)
    return config


def _choose(
    registry: Registry, configured: Sequence[str], names: Sequence[str], directory: Path
) -> list[str]:
    """Return the trackers by the names that their cursors have."""
    if not names:
        if not configured:
            found = "names no tracker"
            if not (directory / CONFIG_NAME).exists():
                found = f"has no {CONFIG_NAME} that would name trackers"
            where, hint = f"run folder {str(directory)!r}", "Name one, as in: --to wandb"
            raise ConfigError(build_message(where, found, action=hint))
        return list(configured)
    return list(dict.fromkeys(_find(registry, name, configured) for name in names))


def _find(registry: Registry, name: str, configured: Sequence[str]) -> str:
    """Return what a tracker is called by the run, whose cursor has that name."""
    same = [n for n in configured if name in (n, _bare(n))]
    if same:
        return same[0]
    try:
        info = registry.find("log", name)
    except DovetailError as err:
        raise type(err)(str(err).replace("config log.use:", "option --to:", 1)) from err
    return next((n for n in (*configured, info.name) if _means(registry, n, info)), name)


def _means(registry: Registry, name: str, info: PluginInfo) -> bool:
    try:
        return registry.find("log", name) == info
    except DovetailError:  # gone since, or the name of several
        return False


def _check_overrides(overrides: Sequence[str], chosen: Sequence[str]) -> set[str]:
    """Refuse settings that change nothing here; return the trackers whose options they change."""
    fields = list(type(TrainingConfig().log).model_fields)
    changed = set()
    for override in overrides:
        key = override.partition("=")[0].strip()
        section, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        bare_names = [_bare(n) for n in chosen]
        if section == "log" and name in bare_names:
            changed.add(name)
        elif not (section == "log" and name in fields) and not (
            section == "run" and name in _PLUGIN_FIELDS
        ):
            known = [f"log.{n}" for n in bare_names]
            expected = f"a setting of {' or '.join(known)}"
            hint = did_you_mean(f"log.{name}", known) if section == "log" else ""
            text = build_message(f"override {key}", "has no effect on trackers", expected, hint)
            raise ConfigError(text)
    return changed


def _bare(name: str) -> str:
    return name.rpartition(":")[2]


def _read_begin(directory: Path) -> dict[str, Any]:
    """Return the record of the last time that the run began or went on."""
    begun: dict[str, Any] = {}
    with suppress(OSError), (directory / LOG_NAME).open("rb") as file:
        for line in file:
            record = parse_record(line) or {}
            if record.get("kind") == "params" and "params" in record:
                begun = record
    return begun
