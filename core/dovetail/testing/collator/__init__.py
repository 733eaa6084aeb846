"""Conformance of the collate hook: what every collator owes its run."""

from __future__ import annotations

from dovetail.testing.collator.suite import CollatorSuite

__all__ = ["CollatorSuite"]
