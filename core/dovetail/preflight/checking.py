"""A config with everything it names: read, validated, its backends loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dovetail._markers import HOOKS, HookName
from dovetail.config import (
    AUTO,
    PluginOptions,
    TrainingConfig,
    apply_overrides,
    parse_config,
    read_config_file,
)
from dovetail.errors import (
    ConfigError,
    DovetailError,
    PluginConflictError,
    join_problems,
)
from dovetail.registry import Registry, default_registry
from dovetail.registry.admission import Admission

ConfigSource: TypeAlias = str | Path | Mapping[str, Any] | TrainingConfig


@dataclass(frozen=True)
class CheckedConfig:
    """A config whose every field fits, with the backends it names loaded."""

    config: TrainingConfig
    directory: Path | None
    """Folder of the config file; modules and relative paths are looked for in it."""
    registry: Registry
    backends: Mapping[HookName, Mapping[str, PluginOptions]]
    """Options of each chosen backend, by hook and name."""
    collator_error: DovetailError | None = None
    """Why `collate.use = "auto"` found nobody; no matter where the loaders are the user's own."""

    def options(self, hook: HookName) -> Mapping[str, PluginOptions]:
        """Return the chosen backends of a hook with their options."""
        return self.backends.get(hook, {})

    def lock(self) -> list[dict[str, str]]:
        """Return the rows of `plugins.lock.json`."""
        return self.registry.lock(self.backends)


def check_config(
    source: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    registry: Registry | None = None,
) -> CheckedConfig:
    """Read a config and check all of it, the options of its backends too.

    Args:
        source: A file, plain tables, or a config.
        overrides: Settings such as `train.lr=3e-4`.
        registry: Where backends come from; the process's own without it.

    Raises:
        ConfigError: Anything does not fit; everything that was found is in one message.
        PluginError: A backend is broken.
    """
    directory: Path | None = None
    if isinstance(source, TrainingConfig):
        tables: Mapping[str, Any] = source.to_dict()
    elif isinstance(source, Mapping):
        tables = source
    else:
        path = Path(source)
        tables = read_config_file(path)
        directory = path.resolve().parent
    config: TrainingConfig | None
    problems: list[str] = []
    if isinstance(source, TrainingConfig) and not overrides:
        # As it is: tables have no word for the `None` that an argument of a factory may be.
        config = source
    else:
        tables = apply_overrides(tables, overrides)
        config, problems = parse_config(tables)
    # Options are checked even where other sections are wrong, so that one look shows it all.
    lenient = config or _readable_part(tables)
    run = lenient.run
    registry = (registry or default_registry()).with_wrappers(
        run.plugins, Admission(run.plugin_autoload, run.plugin_allow)
    )
    registry.list_plugins()  # an error in the list of who may be seen is not everybody's
    backends, errors = _check_backends(lenient, registry, directory)
    collator_errors: list[DovetailError] = []
    if lenient.collate.use == AUTO:
        with _collect(collator_errors):
            tables_by_name = lenient.collate.options
            name, options = registry.find_collator(lenient.task, tables_by_name, directory)
            backends["collate"][name] = options
    if not problems and len(errors) == 1:
        raise errors[0]
    problems += [text for err in errors for text in getattr(err, "problems", (str(err),))]
    if problems or config is None:
        title = f"config {str(source)!r}" if isinstance(source, str | Path) else "config"
        raise ConfigError(join_problems(title, problems), problems)
    collator_error = next(iter(collator_errors), None)
    return CheckedConfig(config, directory, registry, backends, collator_error)


def _readable_part(tables: Mapping[str, Any]) -> TrainingConfig:
    """Return a config of those sections that are right by themselves."""
    sections = {}
    for name, table in tables.items():
        if parse_config({name: table})[0] is not None:
            sections[name] = table
    return parse_config(sections)[0] or TrainingConfig()


def _check_backends(
    config: TrainingConfig, registry: Registry, directory: Path | None
) -> tuple[dict[HookName, dict[str, PluginOptions]], list[DovetailError]]:
    """Load what the config names; return options by hook and name, and everything wrong."""
    chosen: dict[HookName, dict[str, PluginOptions]] = {hook: {} for hook in HOOKS}
    errors: list[DovetailError] = []
    for wrapper in config.run.plugins:
        with _collect(errors):
            registry.load("wrap", wrapper)
    for hook in HOOKS:
        section = config.hook_section(hook)
        is_default = "use" not in section.model_fields_set
        for name in section.names:
            table = section.options.get(name.rpartition(":")[2], {})
            with _collect(errors):
                meant = registry.default_name(hook, name) if is_default else name
                chosen[hook][meant] = registry.build_options(hook, meant, table, directory)
        errors += _check_tables(registry, hook, section.options)
    return chosen, errors


@contextmanager
def _collect(errors: list[DovetailError]) -> Iterator[None]:
    try:
        yield
    except DovetailError as err:
        errors.append(err)


def _check_tables(
    registry: Registry, hook: HookName, tables: Mapping[str, Mapping[str, Any]]
) -> list[DovetailError]:
    """Refuse options of a backend that does not exist; those of one that is not used may stay."""
    errors: list[DovetailError] = []
    for name in tables:
        try:
            registry.find(hook, name)
        except PluginConflictError:  # a table is of whichever of them `use` chooses
            continue
        except ConfigError as err:
            text = str(err).replace(f"config {hook}.use:", f"config {hook}.{name}:", 1)
            errors.append(ConfigError(text))
    return errors
