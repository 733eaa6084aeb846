"""The exporter keeps the contract of the `export` hook, in both ways of reading a model."""

from __future__ import annotations

from dovetail.testing import ExporterSuite


class TestOpenvino(ExporterSuite):
    backend = "openvino"


class TestOpenvinoTraced(ExporterSuite):
    backend = "openvino"
    options = {"trace": True}
