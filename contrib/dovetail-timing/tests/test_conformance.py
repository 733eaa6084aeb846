"""The plugin keeps the contract of wrappers."""

from __future__ import annotations

from dovetail.testing import WrapperSuite


class TestTiming(WrapperSuite):
    backend = "timing"
