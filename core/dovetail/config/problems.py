"""Turns pydantic's errors into messages with a dotted path, the finding and the remedy."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dovetail.errors import build_message, did_you_mean

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NUMBERS: tuple[tuple[type, str], ...] = ((int, "an integer"), (float, "a number"))
_PHRASES = {
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "path_type": "a path",
    "model_type": "a table",
    "dict_type": "a table",
    "mapping_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "invalid_key": "a name",
}
_ABSENCES = ("extra_forbidden", "missing")


class _Place(NamedTuple):
    path: tuple[str | int, ...]
    owner: type[BaseModel] | None
    """The model that the last key is looked for in."""
    field: FieldInfo | None
    """The field that is wrong, or the one that holds the wrong item."""
    is_item: bool
    """Whether it is an item of the field and not the field as a whole."""


def explain(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """Return one message per field that is wrong.

    Args:
        error: What pydantic raised.
        model: The model that was validated.
        where: What to put before a field's path, `config` or `config accumulate.exact`.

    Returns:
        Messages in the order of the fields; the branches of a union become one message.
    """
    grouped: dict[tuple[str | int, ...], tuple[_Place, list[Any]]] = {}
    for detail in error.errors(include_url=False):
        place = _locate(model, detail["loc"])
        grouped.setdefault(place.path, (place, []))[1].append(detail)
    return [_explain_place(place, details, where) for place, details in grouped.values()]


def _explain_place(place: _Place, details: list[Any], where: str) -> str:
    location = _join(where, place.path)
    # A branch of a union that lacks the key says less than one whose value does not fit.
    details = [d for d in details if d["type"] not in _ABSENCES] or details
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _explain_unknown(place, location, first["input"], is_section=where == "config")
    if first["type"] == "missing":
        return build_message(location, "nothing given", _expected(place, details), "Add the key.")
    found = f"got {_show(first['input'])}"
    if first["type"] == "value_error":
        return build_message(location, f"{found}: {first['ctx']['error']}")
    return build_message(location, found, _expected(place, details), _remedy(place))


def _explain_unknown(place: _Place, location: str, value: Any, *, is_section: bool) -> str:
    fields = list(place.owner.model_fields) if place.owner else []
    has_backends = "options" in fields and "use" in fields
    if has_backends:
        fields.remove("options")
    hint = did_you_mean(str(place.path[-1]), fields)
    if has_backends:
        hint = hint or f"Options of a backend go into a table [{place.path[-2]}.<backend>]."
    kind = "section" if is_section and len(place.path) == 1 else "field"
    expected = f"one of {', '.join(fields)}" if fields else "no field here"
    return build_message(location, f"unknown {kind} (= {_show(value)})", expected, hint)


def _expected(place: _Place, details: Sequence[Any]) -> str:
    parts = list(dict.fromkeys(_phrase(place.field, detail) for detail in details))
    text = " or ".join(part for part in parts if part)
    description = (place.field.description if place.field else None) or ""
    help_text = " ".join(description.split(". ")[0].split(".\n")[0].rstrip(".").split())
    if help_text:
        help_text = help_text[0].lower() + help_text[1:]
        return f"{text} ({help_text})" if text else help_text
    return text


def _phrase(field: FieldInfo | None, detail: Any) -> str:
    kind = detail["type"]
    if kind == "missing":
        return ""
    if kind in _PHRASES:
        return _PHRASES[kind]
    if kind.startswith(("int_", "float_", "greater_", "less_")):
        return _number_phrase(field, detail)
    if kind == "string_pattern_mismatch":
        return _pattern_phrase(detail["ctx"]["pattern"])
    text = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Assertion failed, ")
    subject, has, rest = text.partition(" should have ")
    return f"a {subject.lower()} with {rest}" if has else text


def _pattern_phrase(pattern: str) -> str:
    if "auto" in pattern:
        return "'auto', 'cpu', 'cuda', 'cuda:<index>', 'mps' or 'xpu'"
    if ":" in pattern:
        return "an import path 'package.module:object'"
    return "letters, digits, '.', '_' and '-', beginning with a letter or a digit"


def _number_phrase(field: FieldInfo | None, detail: Any) -> str:
    """Return `an integer >= 0 and < 10`, from the bounds of the field where it is known."""
    is_float = detail["type"].startswith("float_")
    branches = dict(iterate_types(field.annotation, field.metadata)) if field else {}
    for kind, phrase in _NUMBERS:
        if kind in branches and not (is_float and kind is int):
            return f"{phrase}{_bounds_phrase(branches[kind])}"
    fallback = {"int_": "an integer", "floa": "a number"}.get(detail["type"][:4], "a value")
    bounds = [detail["ctx"]] if set(detail.get("ctx", ())) & set(_BOUNDS) else []
    return f"{fallback}{_bounds_phrase(bounds)}"


def _bounds_phrase(constraints: Sequence[Any]) -> str:
    parts = []
    for constraint in constraints:
        for key, sign in _BOUNDS.items():
            is_mapping = isinstance(constraint, Mapping)
            bound = constraint.get(key) if is_mapping else getattr(constraint, key, None)
            if bound is not None:
                parts.append(f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}")
    return f" {' and '.join(parts)}" if parts else ""


def iterate_types(
    annotation: Any, constraints: Sequence[Any] = ()
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield the plain types that make up an annotation, each with its constraints."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        # `Field(gt=0)` carries its constraints in a list of its own.
        nested = [c for m in metadata for c in getattr(m, "metadata", [m])]
        yield from iterate_types(inner, nested)
    elif branches := get_args(annotation):
        for branch in branches:
            yield from iterate_types(branch)
    else:
        try:
            hash(annotation)
        except TypeError:  # an argument list of a callable
            return
        yield annotation, constraints


def _remedy(place: _Place) -> str:
    if place.field is None or place.is_item or place.field.is_required():
        return ""
    default = place.field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "Remove the key to do without."
    if isinstance(default, str | int | float):
        return f"Remove the key to use {_show(default)}."
    return "Remove the key to use the default."


def _locate(model: type[BaseModel], loc: Sequence[str | int]) -> _Place:
    """Follow `loc` through the annotations; drop the tags that unions add to it."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    field: FieldInfo | None = None
    is_item = False
    annotation: Any = model
    for part in loc:
        annotation = _strip(annotation)
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = _branch(annotation, part)
            continue
        path.append(part)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner, field = annotation, annotation.model_fields.get(str(part))
            annotation, is_item = field.annotation if field else None, False
        else:
            owner, is_item = None, True
            annotation = _item_of(annotation, part)
    return _Place(tuple(path), owner, field, is_item)


def _strip(annotation: Any) -> Any:
    """Return an annotation without its constraints and without `None`, which adds no tag."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        branches = [b for b in get_args(annotation) if b is not type(None)]
        return _strip(branches[0]) if len(branches) == 1 else annotation
    return annotation


def _branch(union: Any, tag: str | int) -> Any:
    """Return the branch of a union that an error's tag names, where it is a model."""
    branches = map(_strip, get_args(union))
    return next((b for b in branches if getattr(b, "__name__", None) == tag), None)


def _item_of(annotation: Any, part: str | int) -> Any:
    """Return the type of an item of a sequence or a mapping."""
    arguments = get_args(annotation)
    if not arguments:
        return None
    if isinstance(part, int) and get_origin(annotation) is tuple and arguments[-1] is not Ellipsis:
        return arguments[part] if part < len(arguments) else None
    return arguments[0] if isinstance(part, int) else arguments[-1]


def _join(where: str, path: Sequence[str | int]) -> str:
    dotted = ""
    for part in path:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}"
    if not dotted:
        return where
    return f"{where}{dotted}" if " " in where else f"{where} {dotted.removeprefix('.')}"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as a file spells it
    text = repr(value)
    if len(text) > 80:
        text = f"{text[:77]}..."
    if isinstance(value, int | float | str) or value is None:
        return text
    return f"{text} ({type(value).__name__})"
