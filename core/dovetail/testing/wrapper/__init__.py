"""Conformance of plugins that wrap hooks: around a backend, and not in its way."""

from __future__ import annotations

from dovetail.testing.wrapper.suite import WrapperSuite

__all__ = ["WrapperSuite"]
