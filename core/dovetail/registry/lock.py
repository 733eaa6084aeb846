"""Rows of `plugins.lock.json`: what took part in a run, and with which options."""

from __future__ import annotations

import hashlib
import json

from pydantic_core import to_jsonable_python

from dovetail.config import PluginOptions
from dovetail.registry.listing import PluginInfo


def lock_row(info: PluginInfo, options: PluginOptions | None) -> dict[str, str]:
    """Return the row of a plugin; options that are equal give equal digests."""
    # An option may be an object of the session, a tokenizer say, which no file can hold.
    plain = {} if options is None else to_jsonable_python(options, fallback=lambda v: str(type(v)))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return {
        "hook": info.role,
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "options_sha256": digest,
    }
