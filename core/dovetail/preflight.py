"""Everything that can fail late, tried early: before a run has a folder and a first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail._markers import HOOKS, HookName
from dovetail.config import (
    AUTO,
    PluginOptions,
    TrainConfig,
    TrainingConfig,
    apply_overrides,
    parse_config,
    read_config_file,
)
from dovetail.errors import (
    ConfigError,
    DataError,
    DovetailError,
    ModelError,
    build_message,
    did_you_mean,
    join_problems,
)
from dovetail.imports import call_factory
from dovetail.registry import Registry, default_registry
from dovetail.run.checkpoint import random_state, set_random_state
from dovetail.run.evaluate import evaluation_mode
from dovetail.run.loader import Batch, EpochLoader, Splits, as_splits
from dovetail.run.losses import Objective
from dovetail.signature import build_call, primary_output, unwrap
from dovetail.task import TaskSpec

ConfigSource = str | Path | Mapping[str, Any] | TrainingConfig


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
    registry = (registry or default_registry()).with_wrappers(lenient.run.plugins)
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
        for name in section.names:
            table = section.options.get(name.rpartition(":")[2], {})
            with _collect(errors):
                chosen[hook][name] = registry.build_options(hook, name, table, directory)
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
        except ConfigError as err:
            text = str(err).replace(f"config {hook}.use:", f"config {hook}.{name}:", 1)
            errors.append(ConfigError(text))
    return errors


def build_model(checked: CheckedConfig, model: nn.Module | None) -> nn.Module:
    """Return the model given, or the one the config's factory makes.

    Raises:
        ConfigError: There is neither, or the factory does not import, does not take its
            arguments, or returns no module. What it raises itself is not caught.
    """
    config = checked.config.model
    if model is None:
        if config.factory is None:
            hint = 'Write factory = "module:function", or pass model= to dovetail.train.'
            raise ConfigError(build_message("config model.factory", "nothing given", "", hint))
        model = call_factory(
            config.factory, dict(config.kwargs), where="config model", search_dir=checked.directory
        )
    if not isinstance(model, nn.Module):
        where = "config model.factory" if config.factory else "argument model"
        found = f"gave a {type(model).__name__}"
        raise ConfigError(build_message(where, found, "a torch.nn.Module"))
    return model


def build_splits(checked: CheckedConfig, data: Any) -> Splits:
    """Return the splits of the data given, or of the config's factory.

    Raises:
        ConfigError: There is neither, or the factory does not import or does not take its
            arguments. What it raises itself is not caught.
        DataError: What it returns is no split, or a split is empty.
    """
    if data is not None:
        return as_splits(data, "argument data")
    config = checked.config.data
    if config.factory is None:
        hint = 'Write factory = "module:function", or pass data= to dovetail.train.'
        raise ConfigError(build_message("config data.factory", "nothing given", "", hint))
    made = call_factory(
        config.factory, dict(config.kwargs), where="config data", search_dir=checked.directory
    )
    return as_splits(made, f"config data.factory ({config.factory})")


def try_one_batch(
    model: nn.Module,
    loader: EpochLoader,
    task: TaskSpec,
    objective: Objective,
    transform: tuple[str, nn.Module] | None,
) -> list[str]:
    """Run one batch through model and loss, and leave no trace.

    Args:
        model: On its device, not compiled yet.
        loader: Gives the batch.
        task: Its sizes are held against the model's output.
        objective: The loss.
        transform: Input name and the preprocessing that runs on the device.

    Returns:
        Names of the metrics that an evaluation reports.

    Raises:
        ModelError: The model does not take the batch, or its output does not fit the loss.
        DataError: There is no batch, it cannot be collated, or the labels do not fit.
    """
    state = random_state()
    try:
        batch = next(loader.iterate(0), None)
        if batch is None:
            raise DataError(build_message("data split 'train'", "gave no batch"))
        names = ["loss", *_forward(model, dict(batch), task, objective, transform)]
        return names + (["perplexity"] if objective.has_perplexity else [])
    finally:
        set_random_state(state)


def _forward(
    model: nn.Module,
    batch: Batch,
    task: TaskSpec,
    objective: Objective,
    transform: tuple[str, nn.Module] | None,
) -> list[str]:
    call = build_call(model, list(batch), needs_labels=objective.needs_labels_in_model)
    try:
        with evaluation_mode(model), torch.no_grad():
            if transform is not None:
                batch[transform[0]] = transform[1](batch[transform[0]])
            outputs = call(batch)
            check_output_size(task, primary_output(outputs))
            objective.loss(outputs, batch)
            return list(objective.metrics(outputs, batch))
    except DovetailError:
        raise
    except Exception as err:
        shapes = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in batch.items())
        found = f"fails on the first batch ({shapes}): {type(err).__name__}: {err}"
        hint = "Check that the model fits the data; the cause's traceback shows where."
        where = f"model {type(unwrap(model)).__name__}"
        raise ModelError(build_message(where, found, action=hint)) from err


def check_output_size(task: TaskSpec, output: Tensor) -> None:
    """Hold a model's output against the sizes a task states.

    Args:
        task: `num_classes` of a classification, `vocab_size` of a language task.
        output: Logits; classes are dimension 1, token ids the last.

    Raises:
        ModelError: The output has another size.
    """
    size, classes = task.vocab_size, task.class_count
    # A vocabulary may be padded to a size the hardware likes.
    if task.counts_tokens and size is not None and output.shape[-1] < size:
        found = f"has {output.shape[-1]} outputs per token"
        raise ModelError(build_message("model output", found, f"at least task.vocab_size = {size}"))
    has_classes = task.kind in ("classification", "multilabel") and classes is not None
    if has_classes and (output.ndim < 2 or output.shape[1] != classes):
        found = f"has the shape {tuple(output.shape)}"
        expected = f"(batch, {classes}), as the task has {classes} classes"
        hint = "Change the model, or task.num_classes and task.labels."
        raise ModelError(build_message("model output", found, expected, hint))


def check_monitor(
    config: TrainConfig, metric_names: Sequence[str], *, has_validation: bool
) -> None:
    """Check that the settings which need an evaluation have one.

    Args:
        config: The `train` section.
        metric_names: What an evaluation reports, without `val/`.
        has_validation: Whether there is a validation split.

    Raises:
        ConfigError: `monitor` names a metric that will not exist, or `patience` has nothing to
            wait for.
    """
    if not has_validation:
        if config.patience is not None:
            found = f"got {config.patience}, and the data have no validation split"
            hint = "Return one from the data factory, or remove the key."
            raise ConfigError(build_message("config train.patience", found, action=hint))
        return
    known = [*(f"val/{name}" for name in metric_names), "train/loss", "train/grad_norm"]
    if config.monitor not in known:
        found = f"there is no metric {config.monitor!r}"
        expected = f"one of {', '.join(known)}"
        hint = did_you_mean(config.monitor, known)
        raise ConfigError(build_message("config train.monitor", found, expected, hint))
