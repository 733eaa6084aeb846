"""Types of options in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, StringConstraints

from dovetail import ConfigPath, PluginOptions
from dovetail.cli._details import describe_options


class Inner(BaseModel):
    level: int = 1


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (bool, "true | false"),
        (Annotated[float, Field(ge=0, lt=1)], "number >= 0, < 1"),
        (PositiveFloat | None, "number > 0 | none"),
        (Literal["a", "b"], '"a" | "b"'),
        (Literal["a"] | int, '"a" | integer'),
        (tuple[int, ...], "list of integer"),
        (dict[str, int], "table"),
        (Path, "path"),
        (ConfigPath | None, "path | none"),
        (Inner, "table (Inner)"),
        (Annotated[str, StringConstraints(pattern="^a", max_length=3)], None),
        (Any, "any value"),
    ],
)
def test_option_type_is_told_with_its_bounds(annotation: Any, text: str | None) -> None:
    namespace = {"__annotations__": {"option": annotation}, "__module__": __name__}
    model = type("Options", (PluginOptions,), namespace)
    (line,) = describe_options(model)
    text = text or "string at most 3 characters, like ^a"
    assert line == f"  option: {text}, required"


@pytest.mark.parametrize(
    ("default", "text"),
    [(None, "none"), (True, "true"), ("x", '"x"'), ((0.5, 1.0), "[0.5, 1.0]"), (Path("a"), "a")],
)
def test_option_default_is_told_as_a_config_would_have_it(default: Any, text: str) -> None:
    namespace = {"__annotations__": {"option": Any}, "option": default, "__module__": __name__}
    (line,) = describe_options(type("Options", (PluginOptions,), namespace))
    assert line == f"  option: any value = {text}"


def test_option_that_json_cannot_describe_is_told_by_its_annotation() -> None:
    class Options(PluginOptions):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        option: CliOnly

    (line,) = describe_options(Options)
    assert "CliOnly" in line


class CliOnly:
    """A type that pydantic does not know."""
