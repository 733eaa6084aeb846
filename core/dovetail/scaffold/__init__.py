"""Writes the first version of a plugin distribution: one that works, is tested and can be built."""

from __future__ import annotations

from dovetail.scaffold.naming import PluginNames
from dovetail.scaffold.writing import config_example, write_plugin

__all__ = ["PluginNames", "config_example", "write_plugin"]
