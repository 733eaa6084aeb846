"""The JSON Schema of the config says what the parser says."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dovetail import PluginOptions, hookimpl
from dovetail.config import parse_config, read_config_file
from dovetail.registry import Registry
from dovetail.registry.listing import PluginInfo
from dovetail.schema import DIALECT, build_schema

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Level(PluginOptions):
    """One level."""

    size: int = 1
    """Items in it."""


class Options(PluginOptions):
    """What the plugin takes."""

    steps: int = 4
    """Steps it takes."""
    levels: tuple[Level, ...] = ()
    """Levels, one by one."""


def make_plugin(options: type[PluginOptions]) -> types.ModuleType:
    """Return a collate plugin with these options."""
    plugin = types.ModuleType("collator", "Collates nothing.\n\nAt length.")

    def dovetail_collate(task: Any, options: Any) -> None:
        return None

    dovetail_collate.__annotations__["options"] = options
    plugin.dovetail_collate = hookimpl(dovetail_collate)  # type: ignore[attr-defined]
    return plugin


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register(make_plugin(Options), hook="collate", name="levels")
    return made


@pytest.fixture
def schema(registry: Registry) -> dict[str, Any]:
    return build_schema(registry)


def problems_of(schema: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return the dotted places that do not fit."""
    errors = Draft202012Validator(schema).iter_errors(config)
    return sorted(".".join(map(str, error.absolute_path)) for error in errors)


def fields_of(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, table in {"": schema, **schema["$defs"]}.items():
        for key, field in table.get("properties", {}).items():
            yield f"{name}.{key}", field


def test_schema_is_a_valid_schema(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == DIALECT
    Draft202012Validator.check_schema(schema)


def test_schema_has_help_for_every_field(schema: dict[str, Any]) -> None:
    fields = dict(fields_of(schema))
    assert "TrainConfig.lr" in fields
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_schema_has_no_field_that_a_config_file_cannot_have(schema: dict[str, Any]) -> None:
    assert not [name for name, _ in fields_of(schema) if name.endswith("Config.options")]


def test_schema_takes_every_example() -> None:
    schema = build_schema()
    examples = sorted(EXAMPLES.glob("*/*.toml"))
    assert examples
    for path in examples:
        assert problems_of(schema, read_config_file(path)) == [], path


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({}, []),
        ({"collate": {"use": "levels", "levels": {"steps": 3, "levels": [{"size": 2}]}}}, []),
        ({"collate": {"use": "auto"}, "compile": {"use": "off"}}, []),
        ({"export": {"use": "pytorch"}}, []),
        ({"export": {"use": ["pytorch", "someones-tools:format"]}}, []),
        ({"run": {"plugins": ["someones-tools:timer"]}}, []),
        ({"trian": {}}, [""]),
        ({"train": {"lr": -1}}, ["train.lr"]),
        ({"train": {"learning_rate": 1}}, ["train"]),
        ({"collate": {"use": "lvels"}}, ["collate.use"]),
        ({"collate": {"use": "off"}}, ["collate.use"]),
        ({"collate": {"levels": {"steps": "many"}}}, ["collate.levels.steps"]),
        ({"collate": {"levels": {"stpes": 1}}}, ["collate.levels"]),
        ({"collate": {"levels": {"levels": [{"sise": 1}]}}}, ["collate.levels.levels.0"]),
        ({"collate": {"unknown": {}}}, ["collate"]),
        ({"export": {"use": ["pytorch", "pytroch"]}}, ["export.use"]),
        ({"task": {"kind": "clasification"}}, ["task.kind"]),
    ],
)
def test_schema_finds_what_does_not_fit(
    schema: dict[str, Any], config: dict[str, Any], places: list[str]
) -> None:
    assert problems_of(schema, config) == places


@pytest.mark.parametrize(
    "config",
    [
        {"run": {"name": "../up"}},
        {"run": {"seed": -1}},
        {"model": {"factory": "no colon"}},
        {"train": {"epochs": 0}},
        {"train": {"precision": "fp8"}},
        {"train": {"device": "gpu"}},
        {"train": {"warmup_ratio": 1}},
        {"train": {"optimizer": "adamw", "lr": 0.1}},
        {"task": {"inputs": [{"name": "x", "shape": ["batch", 3]}]}},
        {"log": {"use": "tensorboard"}},
    ],
)
def test_schema_and_parser_agree(schema: dict[str, Any], config: dict[str, Any]) -> None:
    assert (problems_of(schema, config) == []) == (parse_config(config)[1] == [])


def test_schema_describes_a_backend_by_its_first_line(schema: dict[str, Any]) -> None:
    table = schema["$defs"]["CollateConfig"]["properties"]["levels"]
    assert table["description"] == "Collates nothing."


def test_schema_leaves_a_plugin_that_does_not_load_unchecked_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry()
    broken = PluginInfo("collate", "broken", "bad-tools", "1.2", "surely_absent_module")
    monkeypatch.setattr(registry, "_installed", [broken])
    schema = build_schema(registry)
    section = schema["$defs"]["CollateConfig"]
    assert "plugin 'broken' (bad-tools 1.2): " in section["description"]
    assert section["properties"]["broken"]["description"].startswith("Not checked: ")
    assert problems_of(schema, {"collate": {"use": "broken", "broken": {"any": 1}}}) == []


def test_schema_leaves_options_without_a_json_form_unchecked() -> None:
    class Strange(PluginOptions, arbitrary_types_allowed=True):
        module: types.ModuleType = sys

    registry = Registry()
    registry.register(make_plugin(Strange), hook="collate", name="strange")
    schema = build_schema(registry)
    assert "have no JSON Schema" in schema["$defs"]["CollateConfig"]["description"]
    assert problems_of(schema, {"collate": {"strange": {"any": 1}}}) == []


def test_schema_keeps_models_of_the_same_name_apart() -> None:
    class Other(PluginOptions):
        levels: tuple[Level, ...] = ()

    def other_level() -> type[PluginOptions]:
        class Level(PluginOptions):
            name: str = ""

        class Options(PluginOptions):
            level: Level = Level()

        return Options

    registry = Registry()
    registry.register(make_plugin(Options), hook="collate", name="first")
    registry.register(make_plugin(other_level()), hook="collate", name="second")
    schema = build_schema(registry)
    assert problems_of(schema, {"collate": {"second": {"level": {"name": "x"}}}}) == []
    assert problems_of(schema, {"collate": {"first": {"levels": [{"name": "x"}]}}}) != []


def test_schema_takes_the_options_of_either_when_two_offer_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry()
    registry.register(make_plugin(Options), hook="collate", name="twice")
    broken = PluginInfo("collate", "twice", "bad-tools", "1.2", "surely_absent_module")
    monkeypatch.setattr(registry, "_installed", [broken])
    schema = build_schema(registry)
    assert problems_of(schema, {"collate": {"twice": {"steps": 2}}}) == []
    names = schema["$defs"]["CollateConfig"]["properties"]["use"]["anyOf"][0]["enum"]
    assert names == ["auto", "twice"]
