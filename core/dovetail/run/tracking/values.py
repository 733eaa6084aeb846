"""What a metric may be called and what its value may be: numbers from wherever they come."""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from dovetail.errors import ConfigError, build_message

if TYPE_CHECKING:
    from torch import Tensor

Value: TypeAlias = "float | Tensor"
"""A number, or one that is still on its device: a scalar tensor of our own."""

HOST_DEVICES = frozenset({"cpu"})
"""Devices whose tensors are read at once, as nothing has to be waited for."""


def add_up(values: Iterable[float]) -> float:
    """Return the sum, correctly rounded; that of values which are not finite as floats have it."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # an infinity on the way, or two that cancel
        return sum(values)


def check_name(name: Any, where: str) -> None:
    """Check that a metric can be called so.

    Raises:
        ConfigError: The name is no string, or blank.
    """
    if not isinstance(name, str) or not name.strip():
        found = f"metric_name must be a non-empty string, got {name!r}"
        raise ConfigError(build_message(where, found, action="Give the metric a name."))


def as_number(name: str, value: Any, where: str) -> Value | None:
    """Return a value as a float, or a tensor of an accelerator as a wide scalar copy of it there.

    A copy, as the caller may go on to change the tensor in place. `None` for a tensor without
    data, of a model that is only being traced.

    Raises:
        ConfigError: It is no single real number.
    """
    kind = type(value)
    if kind is float:
        return value  # type: ignore[no-any-return]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _as_scalar(name, value, where)
    if kind is not int and hasattr(value, "dtype") and hasattr(value, "item"):
        if getattr(value, "size", 1) != 1:
            raise _many(name, f"{kind.__name__} of shape {tuple(value.shape)}", where)
        if value.dtype.kind in "biuf":
            value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError as err:
            raise _no_number(name, "an integer beyond the range of floats", where) from err
    raise _no_number(name, f"{reprlib.repr(value)}, a {kind.__name__}", where)


def _as_scalar(name: str, tensor: Tensor, where: str) -> Value | None:
    import torch

    if tensor.numel() != 1:
        raise _many(name, f"tensor of shape {tuple(tensor.shape)}", where)
    if tensor.is_complex():
        raise _no_number(name, f"a tensor of {tensor.dtype}", where)
    device = tensor.device.type
    if device == "meta" or type(tensor).__name__ == "FakeTensor":
        return None
    if device in HOST_DEVICES:
        return float(tensor.item())
    wide = torch.float32 if device == "mps" else torch.float64
    return tensor.detach().reshape(()).to(wide, copy=True)


def _many(name: str, what: str, where: str) -> ConfigError:
    found = f"the value is a {what}"
    hint = "Reduce it first, with .mean() say, or use log_histogram."
    expected = "a number or a tensor of one element"
    return ConfigError(build_message(f"{where} {name!r}", found, expected, hint))


def _no_number(name: str, what: str, where: str) -> ConfigError:
    found = f"non-numeric value: {what}"
    expected = "a number, a NumPy scalar or a tensor of one element"
    return ConfigError(build_message(f"{where} {name!r}", found, expected))


def to_floats(values: Sequence[Value]) -> list[float]:
    """Return numbers and scalar tensors as floats, with one transfer from each device."""
    found = list(values)
    places: dict[Any, list[int]] = {}
    for place, value in enumerate(values):
        if not isinstance(value, float):
            places.setdefault(value.device, []).append(place)
    if not places:
        return found  # type: ignore[return-value]
    import torch

    for group in places.values():
        stacked: list[Any] = [found[place] for place in group]
        for place, number in zip(group, torch.stack(stacked).tolist(), strict=True):
            found[place] = number
    return found  # type: ignore[return-value]
