"""Names and values in the form that MLflow takes."""

from __future__ import annotations

import hashlib
import re

MAX_VALUE = 6000
"""Characters of a parameter's value.

Source: `mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`.
"""

_MAX_NAME = 200  # of MLflow's 250, so that a prefix fits
_REFUSED = re.compile(r"[^\w.\- /]")  # MLflow takes a colon as well, but not on Windows
_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*(?=@)")


def safe_name(name: str) -> str:
    """Return `name` as MLflow takes it; what had to change ends in a digest of the original.

    The digest keeps two names apart that would become one.
    """
    parts = [part for part in _REFUSED.sub("_", name).split("/") if part not in ("", ".", "..")]
    plain = "/".join(parts)
    plain = f"_{plain}" if plain.startswith("..") or not plain else plain
    if plain == name and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: _MAX_NAME - 9].rstrip('/')}-{digest}"


def short_value(value: object) -> str:
    """Return `value` as text, cut to what a parameter holds."""
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def without_password(value: object) -> object:
    """Return `value`; an address in it loses its password."""
    return _PASSWORD.sub(r"\1:***", value) if isinstance(value, str) else value
