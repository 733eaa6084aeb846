"""Turns pydantic's errors into messages with a dotted path, the finding and the remedy."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dovetail.errors import build_message, did_you_mean

_RELATIONS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """Return one message per field that is wrong.

    Args:
        error: What pydantic raised.
        model: The model that was validated.
        where: What to put before a field's path, `config` or `config accumulate.exact`.

    Returns:
        Messages in the order of the fields; the branches of a union become one message.
    """
    grouped: dict[tuple[Any, ...], list[Any]] = {}
    for detail in error.errors(include_url=False):
        path, _ = _locate(model, detail["loc"])
        grouped.setdefault(path, []).append(detail)
    return [_explain_field(model, path, details, where) for path, details in grouped.items()]


def _explain_field(
    model: type[BaseModel], path: Sequence[Any], details: Sequence[Any], where: str
) -> str:
    owner, field = _locate(model, path)[1]
    location = _join(where, path)
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _explain_unknown(owner, path, location, first["input"])
    if first["type"] == "missing":
        return build_message(location, "nothing given", _expected(field, details), "Add the key.")
    found = f"got {_show(first['input'])}"
    if first["type"] == "value_error":
        return build_message(location, f"{found}: {first['ctx']['error']}")
    return build_message(location, found, _expected(field, details), _remedy(field))


def _explain_unknown(
    owner: type[BaseModel] | None, path: Sequence[Any], location: str, value: Any
) -> str:
    fields = [name for name in (owner.model_fields if owner else {}) if name != "options"]
    hint = did_you_mean(str(path[-1]), fields)
    has_backends = owner is not None and "options" in owner.model_fields
    if has_backends:
        hint = hint or f"Options of a backend go into a table [{path[-2]}.<backend>]."
    kind = "section" if len(path) == 1 else "field"
    expected = f"one of {', '.join(fields)}" if fields else "no field here"
    return build_message(location, f"unknown {kind} (= {_show(value)})", expected, hint)


def _expected(field: FieldInfo | None, details: Sequence[Any]) -> str:
    parts = list(dict.fromkeys(_phrase(field, detail) for detail in details))
    text = " or ".join(part for part in parts if part)
    help_text = (
        (field.description or "").split(". ")[0].split(".\n")[0].rstrip(".") if field else ""
    )
    help_text = " ".join(help_text.split())
    if help_text:
        help_text = help_text[0].lower() + help_text[1:]
        return f"{text} ({help_text})" if text else help_text
    return text


def _phrase(field: FieldInfo | None, detail: Any) -> str:
    kind = detail["type"]
    if kind == "missing":
        return ""
    if kind in _RELATIONS:
        key, sign = _RELATIONS[kind]
        return f"{_kind_of(field)} {sign} {detail['ctx'][key]:g}"
    if kind == "finite_number":
        return "a finite number"
    if kind.startswith("int_"):
        return _bounded("an integer", field)
    if kind.startswith("float_"):
        return _bounded("a number", field)
    if kind == "string_pattern_mismatch":
        return _pattern_phrase(detail["ctx"]["pattern"])
    return str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def _pattern_phrase(pattern: str) -> str:
    if ":" in pattern and "auto" not in pattern:
        return "an import path 'package.module:object'"
    if "auto" in pattern:
        return "'auto', 'cpu', 'cuda', 'cuda:<index>', 'mps' or 'xpu'"
    return "letters, digits, '.', '_' and '-', beginning with a letter or a digit"


def _bounded(kind: str, field: FieldInfo | None) -> str:
    for constraint in field.metadata if field else ():
        for key, sign in _RELATIONS.values():
            bound = getattr(constraint, key, None)
            if bound is not None:
                return f"{kind} {sign} {bound:g}"
    return kind


def _kind_of(field: FieldInfo | None) -> str:
    annotation = field.annotation if field else None
    candidates = (annotation, *get_args(annotation))
    for kind, phrase in _KINDS:
        if kind in candidates:
            return phrase
    return "a value"


def _remedy(field: FieldInfo | None) -> str:
    if field is None or field.is_required():
        return ""
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "Remove the key to do without."
    if isinstance(default, str | int | float):
        return f"Remove the key to use {_show(default)}."
    return "Remove the key to use the default."


def _locate(
    model: type[BaseModel], loc: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[type[BaseModel] | None, FieldInfo | None]]:
    """Follow `loc` through the models; drop the tags that unions add to it."""
    owner: type[BaseModel] | None = model
    field: FieldInfo | None = None
    path: list[Any] = []
    for index, part in enumerate(loc):
        if owner is None or isinstance(part, int):
            if isinstance(part, int) or (field is not None and _is_mapping(field)):
                path.append(part)
            continue
        if part not in owner.model_fields:
            # An unknown key, or the tag of a validator: only the former is a place in the config.
            is_key = index == len(loc) - 1
            return (*path, *([part] if is_key else [])), (owner, None)
        field = owner.model_fields[part]
        path.append(part)
        last_owner, owner = owner, _model_of(field.annotation)
        if index == len(loc) - 1:
            return tuple(path), (last_owner, field)
    return tuple(path), (owner or model, field)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        for branch in get_args(annotation):
            if (found := _model_of(branch)) is not None:
                return found
    return None


def _is_mapping(field: FieldInfo) -> bool:
    origin = get_origin(field.annotation)
    return origin is not None and hasattr(origin, "keys")


def _join(where: str, path: Sequence[Any]) -> str:
    dotted = ""
    for part in path:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}"
    if not dotted:
        return where
    return f"{where}{dotted}" if " " in where else f"{where} {dotted.removeprefix('.')}"


def _show(value: Any) -> str:
    text = repr(value)
    if len(text) > 80:
        text = f"{text[:77]}..."
    if isinstance(value, bool | int | float | str) or value is None:
        return text
    return f"{text} ({type(value).__name__})"
