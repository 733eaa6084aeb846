"""What a plugin's options are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from dovetail.config.problems import iterate_types


class ClosedModel(BaseModel):
    """Base of everything a config holds: frozen, closed, with help in attribute docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts true as 1, so that `patience = true` would be taken for one evaluation.
        if isinstance(value, bool):
            annotation = cls.model_fields[info.field_name or ""].annotation
            kinds = {kind for kind, _ in iterate_types(annotation)}
            if kinds & {int, float} and not kinds & {bool, Any, True, False}:
                raise ValueError("a number is expected, true and false are none")
        return value


class PluginOptions(ClosedModel):
    """Base of a plugin's options: frozen, closed, with field help in attribute docstrings.

    A plugin subclasses it and annotates its `options` parameter with the subclass. The table
    `[section.<name>]` of the config is validated into it before the hook is called. A plugin
    without options takes this class itself, which refuses every option.
    """


def _resolve(path: Path, info: ValidationInfo) -> Path:
    context: dict[str, Any] = info.context or {}
    base = context.get("config_dir")
    return path if base is None or path.is_absolute() else Path(base) / path


ConfigPath: TypeAlias = Annotated[Path, AfterValidator(_resolve)]
"""A path in a config; a relative one is meant from the folder of the config file."""
