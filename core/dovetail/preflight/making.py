"""Model and data of a run, from the caller or from the config's factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dovetail.errors import ConfigError, build_message
from dovetail.imports import call_factory
from dovetail.preflight.checking import CheckedConfig
from dovetail.run.loader import Splits, as_splits
from dovetail.types import Recipe


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


def build_recipe(checked: CheckedConfig) -> Recipe | None:
    """Return how the config's model is built again in another process."""
    config = checked.config.model
    if config.factory is None:
        return None
    return Recipe(config.factory, dict(config.kwargs), _source_dir(config.factory, checked))


def _source_dir(factory: str, checked: CheckedConfig) -> Path | None:
    if checked.directory is None:
        return None
    top = factory.partition(":")[0].partition(".")[0]
    candidates = (checked.directory / f"{top}.py", checked.directory / top / "__init__.py")
    return checked.directory if any(path.is_file() for path in candidates) else None
