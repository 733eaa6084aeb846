"""The device of a run and the number format it computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dovetail.config import TrainConfig
from dovetail.errors import ConfigError, build_message

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device a config names.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1", "mps" or "xpu".

    Raises:
        ConfigError: It is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).split("\n")[0]
        hint = 'Use train.device = "auto".'
        where = "config train.device"
        raise ConfigError(
            build_message(where, f"{name!r} is not available: {reason}", action=hint)
        ) from err
    return device


def build_autocast(config: TrainConfig, device: torch.device) -> Callable[[], Any] | None:
    """Return what opens the autocast of a precision, or `None` for fp32."""
    dtype = _AUTOCAST.get(config.precision)
    if dtype is None:
        return None
    return lambda: torch.autocast(device.type, dtype=dtype)


def build_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the gradient scaler that fp16 needs, or `None` for the other formats."""
    return torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
