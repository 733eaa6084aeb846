"""OpenVINO IR: one model that Intel's runtime runs on any CPU, without PyTorch.

The runtime computes in float32: left to itself it takes bfloat16 where the processor has it, and is
off by some 0.5 %.
"""

from __future__ import annotations

from dovetail import PluginOptions, hookimpl
from dovetail_openvino._exporter import OpenvinoExporter

__all__ = ["OpenvinoExporter", "Options", "dovetail_api", "dovetail_export"]

dovetail_api = 1


class Options(PluginOptions):
    """Options of the OpenVINO exporter."""

    trace: bool = False
    """Record one run of the model (torch.jit.trace) instead of reading it whole (torch.export).
    Takes recurrent layers with sequences of every length. A branch on values is fixed to what the
    example took, and only the golden batches of the bundle can tell."""


@hookimpl
def dovetail_export(options: Options) -> OpenvinoExporter:
    """Make the exporter."""
    return OpenvinoExporter(is_traced=options.trace)
