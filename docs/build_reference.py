"""Writes the pages of docs/reference that follow from the code: hooks, config, command line.

Run `python docs/build_reference.py` after a change of a hook, a field or a command; a test checks
that the pages are as the code says.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dovetail import hookspecs
from dovetail._markers import GROUPS, HOOKS, WRAPPER_GROUP, hook_function
from dovetail.cli._group import cli
from dovetail.config import TrainingConfig
from dovetail.registry import Registry
from dovetail.task import TensorSpec

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- Written by `python docs/build_reference.py` from the code; do not edit. -->\n"

_WRAPPERS = (
    f"Plugins in the group `{WRAPPER_GROUP}` wrap hooks: functions of the same names and "
    "arguments, marked `@hookimpl(wrapper=True)`, that `yield` once and return what the hook "
    "answers. They act only if `[run] plugins` names them, the first outermost."
)


def hooks_page() -> str:
    """Return the page of the five contracts."""
    parts = ["# Hooks", _NOTE, (inspect.getdoc(hookspecs) or "").split("\n", 1)[1].strip()]
    for hook in HOOKS:
        function = getattr(hookspecs, hook_function(hook))
        signature = str(inspect.signature(function)).replace("'", "")
        doc = inspect.getdoc(function) or ""
        head, _, arguments = doc.partition("\nArgs:\n")
        arguments, _, returns = arguments.partition("\nReturns:\n")
        parts += [
            f"## `{function.__name__}{signature}`",
            f"Entry-point group: `{GROUPS[hook]}`",
            head.strip(),
            "**Arguments**",
            "\n".join(f"- `{n}`: {t}" for n, t in _entries(arguments)),
            f"**Returns** {_lower(returns)}",
        ]
    parts += [
        "## Wrappers",
        _WRAPPERS,
    ]
    return "\n\n".join(parts) + "\n"


def _lower(block: str) -> str:
    text = " ".join(block.split())
    return text[:1].lower() + text[1:]


def _entries(block: str) -> Iterator[tuple[str, str]]:
    for line in textwrap.dedent(block).strip().splitlines():
        name, _, text = line.partition(": ")
        yield name, text


def config_page() -> str:
    """Return the page of every section and field, built-in backends' options included."""
    intro = (
        "A config is TOML, or JSON with the same tables. Every field is used or refused. On the "
        "command line `section.key=value` sets a field, the value read as TOML. A `None` default "
        "means that the key is left out."
    )
    parts = ["# Config", _NOTE, intro]
    for name, field in TrainingConfig.model_fields.items():
        parts += [f"## `[{name}]`", _first_line(field.annotation), _table(field.annotation)]
        if name == "task":
            parts += ["### `[[task.inputs]]`", _first_line(TensorSpec), _table(TensorSpec)]
        if name in HOOKS:
            parts += list(_backends(name))
    return "\n\n".join(parts) + "\n"


def _backends(hook: Any) -> Iterator[str]:
    registry = Registry()
    for info in registry.list_plugins(hook):
        if info.distribution != "dovetail":
            continue
        backend = registry.load(hook, info.name)
        yield f"### `[{hook}.{info.name}]`"
        yield backend.summary
        model = backend.options_model(hook)
        yield _table(model) if model.model_fields else "It has no options."


def _first_line(model: Any) -> str:
    return (inspect.getdoc(model) or "").split("\n")[0]


def _table(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if field.exclude:
            rows.append("| *table named like a backend* | table | | that backend's options |")
            continue
        kind = _type_of(schema["properties"][name], schema.get("$defs", {}))
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "required" if default is PydanticUndefined else f"`{_plain(default)}`"
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {kind} | {shown} | {meaning} |".replace("|`", "| `"))
    return "\n".join(rows)


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        value = value.as_posix()
    return json.dumps(value) if value is not None else "None"


def _type_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _type_of(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        branches = (_type_of(s, definitions) for s in schema["anyOf"] if s.get("type") != "null")
        return " or ".join(dict.fromkeys(branches))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(v)}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = str(schema.get("type", "any"))
    bounds = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([{"object": "table", "array": "list"}.get(kind, kind), *limits])


def cli_page() -> str:
    """Return the page of every command, as `--help` prints it."""
    parts = ["# Command line", _NOTE, *_help(cli, "dovetail", None)]
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(
        command,
        info_name=path.rsplit(" ", 1)[-1],
        parent=parent,
        max_content_width=90,
        terminal_width=90,
        **command.context_settings,
    )
    yield f"## `{path}`"
    yield f"```text\n{command.get_help(context).rstrip()}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _help(child, f"{path} {name}", context)


PAGES = {"hooks.md": hooks_page, "config.md": config_page, "cli.md": cli_page}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for page, build in PAGES.items():
        (REFERENCE / page).write_text(build(), encoding="utf-8")
        sys.stdout.write(f"docs/reference/{page}\n")
