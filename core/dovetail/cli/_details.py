"""Describes one plugin: what it is, where it comes from, and its options."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail.cli._state import list_extra, read_state
from dovetail.errors import UnknownPluginError, build_message, did_you_mean
from dovetail.registry.listing import ROLES, PluginInfo, Role

if TYPE_CHECKING:
    from dovetail import PluginOptions

_WIDTH = 80
_LIST_SECTIONS = ("log", "export")
_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "like {}",
}


def find_plugins(
    everyone: Sequence[PluginInfo], name: str, role: Role | None = None
) -> list[PluginInfo]:
    """Return the plugins a name means, of one hook or of all.

    Args:
        everyone: The installed plugins.
        name: `name`, `hook.name`, or `distribution:name`.
        role: The hook, if only one is meant.

    Raises:
        UnknownPluginError: There is none.
    """
    found = [p for p in everyone if role in (None, p.role) and p.is_named(name)]
    if not found and (parts := name.partition("."))[0] in ROLES:
        wanted = [p for p in everyone if p.role == parts[0]]
        found = [p for p in wanted if role in (None, p.role) and p.is_named(parts[2])]
    if found:
        return found
    choices = [p.name for p in everyone if role in (None, p.role)]
    expected = f"one of {', '.join(dict.fromkeys(choices)) or '(none is installed)'}"
    where = f"plugin {name!r}" + (f" of the {role} hook" if role else "")
    elsewhere = [p.role for p in everyone if p.is_named(name)]
    hint = did_you_mean(name.rpartition(":")[2], choices)
    hint = f"It is a plugin of the {elsewhere[0]} hook." if elsewhere else hint
    raise UnknownPluginError(build_message(where, "is not installed", expected, hint))


def describe_plugin(info: PluginInfo) -> Iterator[str]:
    """Yield the lines that tell of a plugin, which is imported for it.

    Raises:
        PluginError: It is broken, or needs a package that is not installed.
    """
    from dovetail.registry.loading import import_plugin, load_backend

    backend = load_backend(info, import_plugin(info))
    kind = "wraps hooks" if info.role == "wrap" else f"plugin of the {info.role} hook"
    yield f"{info.name}: {kind}"
    if backend.summary:
        yield from _indented(backend.summary, 2)
    yield f"  from       {info.distribution} {info.version} ({info.value})"
    if extra := list_extra(info):
        yield f"  extra      {info.distribution}[{info.name}]: {', '.join(extra)}"
    if install := read_state(info, [info]).install:
        yield f"  install    {install}"
    if info.role == "wrap":
        yield f'  to use it  [run] plugins = ["{info.name}"]'
        yield f"  around     {', '.join(backend.options_models)}"
        return
    use = f'["{info.name}"]' if info.role in _LIST_SECTIONS else f'"{info.name}"'
    yield f"  to use it  [{info.role}] use = {use}"
    lines = [*describe_options(backend.options_model(info.role))]
    if lines:
        yield ""
        yield f"Options, in [{info.role}.{info.name}]:"
        yield from lines
    else:
        yield "  options    none"


def describe_options(model: type[PluginOptions]) -> Iterator[str]:
    """Yield the lines of a plugin's options: name, type with bounds, default, and help."""
    schema = _schema_of(model)
    definitions = schema.get("$defs", {})
    for name, field in model.model_fields.items():
        described = schema.get("properties", {}).get(field.alias or name)
        kind = str(field.annotation) if described is None else describe_type(described, definitions)
        if field.is_required():
            yield f"  {name}: {kind}, required"
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            yield f"  {name}: {kind} = {_spell(default)}"
        if field.description:
            yield from _indented(field.description, 6)


def describe_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return the type of a JSON Schema in words, its bounds with it.

    Args:
        schema: The schema of one value.
        definitions: What its references lead to.
    """
    if "$ref" in schema:
        target = str(schema["$ref"]).rpartition("/")[2]
        inner = definitions.get(target, {})
        return describe_type(inner, definitions) if "enum" in inner else f"table ({target})"
    if "const" in schema:
        return _spell(schema["const"])
    if "enum" in schema:
        return " | ".join(_spell(value) for value in schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            branches = (describe_type(branch, definitions) for branch in schema[union])
            return " | ".join(dict.fromkeys(branches))
    kind = str(schema.get("type", "any value"))
    if kind == "array":
        items = schema.get("items")
        kind = f"list of {describe_type(items, definitions)}" if items else "list"
    kind = {"object": "table", "null": "none", "boolean": "true | false"}.get(kind, kind)
    kind = "path" if schema.get("format") in ("path", "file-path", "directory-path") else kind
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return f"{kind} {', '.join(bounds)}" if bounds else kind


def _schema_of(model: type[PluginOptions]) -> dict[str, Any]:
    with warnings.catch_warnings():
        # A default that JSON cannot hold is shown as Python writes it.
        warnings.simplefilter("ignore")
        try:
            return model.model_json_schema()
        except Exception:  # a type JSON cannot describe is shown by its annotation
            return {}


def _spell(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    return str(value)


def _indented(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=margin, subsequent_indent=margin
    )
