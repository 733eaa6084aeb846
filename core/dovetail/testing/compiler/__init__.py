"""Conformance of the compile hook: faster, and otherwise the same model."""

from __future__ import annotations

from dovetail.testing.compiler.suite import CompilerSuite

__all__ = ["CompilerSuite"]
