"""Conformance of the `log` hook: what a tracker is given stands in its store, in order and once."""

from __future__ import annotations

from dovetail.testing.tracker.suite import TrackerSuite

__all__ = ["TrackerSuite"]
