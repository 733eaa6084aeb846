"""Conformance of the accumulate hook: a step equals that of the one large batch."""

from __future__ import annotations

from dovetail.testing.accumulator.suite import AccumulatorSuite

__all__ = ["AccumulatorSuite"]
