"""Describes one plugin: what it is, where it comes from, and its options."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail._markers import API_VERSION, HOOKS, PROJECT, hook_function
from dovetail.cli._state import PluginState, list_extra, list_requirements, read_state
from dovetail.errors import UnknownPluginError, build_message, did_you_mean
from dovetail.registry.admission import Admission
from dovetail.registry.checkup import editable_folder
from dovetail.registry.listing import KNOWN_CONTRIB, ROLES, PluginInfo, Role

if TYPE_CHECKING:
    from dovetail import PluginOptions
    from dovetail.registry import Backend

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
    everyone: Sequence[PluginInfo],
    name: str,
    role: Role | None = None,
    admission: Admission | None = None,
) -> list[PluginInfo]:
    """Return the plugins a name means, of one hook or of all.

    Args:
        everyone: The installed plugins.
        name: `name`, `hook.name`, or `distribution:name`.
        role: The hook, if only one is meant.
        admission: Who may be seen; everyone without it.

    Raises:
        UnknownPluginError: There is none, or it is kept out.
    """
    admission = admission or Admission()
    found = _match(everyone, name, role)
    if admitted := [p for p in found if admission.admits(p)]:
        return admitted
    choices = [p.name for p in everyone if role in (None, p.role) and admission.admits(p)]
    expected = f"one of {', '.join(dict.fromkeys(choices)) or '(none is installed)'}"
    where = f"plugin {name!r}" + (f" of the {role} hook" if role else "")
    if found:
        kept_out = f"is kept out by {admission.reason()}"
        hint = f"{found[0].distribution} offers it: allow it there."
        raise UnknownPluginError(build_message(where, kept_out, expected, hint))
    plain = name.rpartition(":")[2].rpartition(".")[2]
    elsewhere = [p.role for p in everyone if p.is_named(name)]
    contrib = [d for (r, n), d in KNOWN_CONTRIB.items() if n == plain and role in (None, r)]
    if elsewhere:
        hint = f"It is a plugin of the {elsewhere[0]} hook."
    elif contrib:
        hint = f"Install it: pip install {contrib[0]}"
    else:
        hint = did_you_mean(name.rpartition(":")[2], choices)
    raise UnknownPluginError(build_message(where, "is not installed", expected, hint))


def _match(everyone: Sequence[PluginInfo], name: str, role: Role | None) -> list[PluginInfo]:
    found = [p for p in everyone if role in (None, p.role) and p.is_named(name)]
    if not found and (parts := name.partition("."))[0] in ROLES:
        wanted = [p for p in everyone if p.role == parts[0]]
        found = [p for p in wanted if role in (None, p.role) and p.is_named(parts[2])]
    return found


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
    yield from _rows(_describe_origin(info))
    yield from _rows(_describe_api(backend))
    if info.role == "wrap":
        yield from _rows(_describe_wrapper(backend))
        return
    use = f'["{info.name}"]' if info.role in _LIST_SECTIONS else f'"{info.name}"'
    yield from _rows([("to use it", f"[{info.role}] use = {use}")])
    lines = [*describe_options(backend.options_model(info.role))]
    if lines:
        yield ""
        yield f"Options, in [{info.role}.{info.name}]:"
        yield from lines
    else:
        yield from _rows([("options", "none")])


def _rows(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (f"  {title:<9}  {text}" for title, text in rows)


def _describe_origin(info: PluginInfo) -> Iterator[tuple[str, str]]:
    """Yield where an imported plugin comes from, and what it needs installed."""
    yield "from", f"{info.distribution} {info.version} ({info.value})"
    if folder := editable_folder(info.distribution):
        yield "editable", f"from {folder}"
    module = sys.modules.get(info.value.partition(":")[0].strip())
    if file := getattr(module, "__file__", None):
        yield "file", file
    state = read_state(info)
    if needs := list_requirements(info) if info.distribution != PROJECT else []:
        yield "needs", _mark_missing(needs, state)
    if extra := list_extra(info):
        yield "extra", f"{info.distribution}[{info.name}]: {_mark_missing(extra, state)}"
    if state.install:
        yield "install", state.install


def _mark_missing(packages: Sequence[str], state: PluginState) -> str:
    return ", ".join(f"{p} (missing)" if p in state.missing else p for p in packages)


def _describe_api(backend: Backend) -> Iterator[tuple[str, str]]:
    stated = getattr(backend.plugin, f"{PROJECT}_api", None)
    yield "API", f"{API_VERSION}, as it states none" if stated is None else str(stated)


def _describe_wrapper(backend: Backend) -> Iterator[tuple[str, str]]:
    yield "around", ", ".join(h for h in HOOKS if hook_function(h) in backend.options_models)
    for word, names in (("before", backend.before), ("after", backend.after)):
        if names:
            yield word, ", ".join(names)
    yield "to use it", f'[run] plugins = ["{backend.info.name}"]'


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
