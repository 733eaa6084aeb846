"""What a plugin's options are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class PluginOptions(BaseModel):
    """Base of a plugin's options: frozen, closed, with field help in attribute docstrings.

    A plugin subclasses it and annotates its `options` parameter with the subclass. The table
    `[section.<name>]` of the config is validated into it before the hook is called. A plugin
    without options takes this class itself, which refuses every option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _resolve(path: Path, info: ValidationInfo) -> Path:
    context: dict[str, Any] = info.context or {}
    base = context.get("config_dir")
    return path if base is None or path.is_absolute() else Path(base) / path


ConfigPath: TypeAlias = Annotated[Path, AfterValidator(_resolve)]
"""A path in a config; a relative one is meant from the folder of the config file."""
