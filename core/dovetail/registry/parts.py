"""Whether the part that a hook made can be called as a run will call it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.errors import BrokenPluginError, build_message

if TYPE_CHECKING:
    from torch import nn


def check_part(part: object, kind: type, where: str) -> None:
    """Check a part against its protocol, its methods' parameters included.

    Args:
        part: What a hook answered.
        kind: The protocol, or a class.
        where: Plugin and hook, for messages.

    Raises:
        BrokenPluginError: Members are missing, or a method does not take what it will be given.
    """
    if not isinstance(part, kind):
        lacking = [name for name in _members(kind) if not hasattr(part, name)]
        found = f"answered a {type(part).__name__}"
        found += f" without {', '.join(lacking)}" if lacking else ""
        raise BrokenPluginError(build_message(where, found, with_article(kind)))
    for name in _members(kind):
        method = vars(kind)[name]
        # The `__call__` of a plain function tells nothing of its parameters.
        actual = part if name == "__call__" else getattr(part, name)
        if inspect.isfunction(method) and (problem := _mismatch(actual, method)):
            found = f"answered a {type(part).__name__} whose {name}{problem}"
            spelt = ", ".join(list(inspect.signature(method).parameters)[1:])
            raise BrokenPluginError(build_message(where, found, f"{name}({spelt})"))


def check_keys(model: nn.Module, before: Sequence[str], where: str) -> None:
    """Check that a compiled model saves its weights under the names they had.

    Args:
        model: What a compiler returned.
        before: Keys of the `state_dict` it was given.
        where: Plugin, for messages.

    Raises:
        BrokenPluginError: The keys are others; checkpoints and bundles would not fit the model.
    """
    after = list(model.state_dict())
    if after != list(before):
        old = next((key for key in before if key not in after), "none")
        new = next((key for key in after if key not in before), "none")
        found = f"changed the keys of the model's state_dict: {old!r} became {new!r}"
        hint = "Compile in place, as module.compile() does."
        raise BrokenPluginError(build_message(where, found, "the same keys", hint))


def with_article(kind: type) -> str:
    """Return a class's name with its article, for messages."""
    return f"an {kind.__name__}" if kind.__name__[0] in "AEIOU" else f"a {kind.__name__}"


def _members(kind: type) -> list[str]:
    """Return the public members of a protocol; a class has too many to be listed."""
    if not getattr(kind, "_is_protocol", False):
        return []
    return sorted(n for n in vars(kind) if not n.startswith("_") or n == "__call__")


def _mismatch(method: Any, declared: Any) -> str:
    """Return how a method differs from the declared one, or an empty string.

    What has no default is given by position, the rest by name, as the run does.
    """
    if not callable(method):
        return f" is a {type(method).__name__}"
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # written in C
        return ""
    parameters = list(inspect.signature(declared).parameters.values())[1:]
    by_position = [p.name for p in parameters if p.default is p.empty]
    by_name = {p.name: None for p in parameters if p.default is not p.empty}
    try:
        signature.bind(*by_position, **by_name)
    except TypeError:
        return str(signature)
    return ""
