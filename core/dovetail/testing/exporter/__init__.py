"""Conformance of the `export` hook: an artifact says what its model says, and stands on its own."""

from __future__ import annotations

from dovetail.testing.exporter.suite import ExporterSuite

__all__ = ["ExporterSuite"]
