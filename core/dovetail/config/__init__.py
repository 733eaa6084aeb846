"""The config of a run: its sections, how it is read, and how its errors are told."""

from __future__ import annotations

from dovetail.config.options import ConfigPath, PluginOptions

__all__ = ["ConfigPath", "PluginOptions"]
