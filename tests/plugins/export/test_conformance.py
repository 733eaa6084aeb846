from __future__ import annotations

from dovetail.testing import ExporterSuite


class TestOnnx(ExporterSuite):
    backend = "onnx"


class TestPytorch(ExporterSuite):
    backend = "pytorch"
