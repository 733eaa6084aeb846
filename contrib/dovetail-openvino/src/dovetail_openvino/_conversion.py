"""From a PyTorch model to OpenVINO's graph."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dovetail.errors import build_message

if TYPE_CHECKING:
    from torch import nn

    from dovetail.types import ExportInputs

_TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "bool": "boolean",
}
"""OpenVINO's names of the types that a signature can have."""

_CHATTY = (
    "torch.export",
    "torch.fx.experimental.recording",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers of torch that tell of an export what its error tells too."""


def convert(model: nn.Module, inputs: ExportInputs, *, is_traced: bool) -> Any:
    """Return the graph of `model`, its inputs named and shaped as the signature says.

    Args:
        model: In eval mode on the CPU.
        inputs: Example batch and signature.
        is_traced: Record one run of the model instead of reading it whole.
    """
    import openvino

    with _quiet():
        if is_traced:
            ports = [
                (_partial_shape(spec.shape), getattr(openvino.Type, _TYPES[spec.dtype]))
                for spec in inputs.specs
            ]
            example = tuple(inputs.tensors.values())
            graph = openvino.convert_model(model, input=ports, example_input=example)
        else:
            graph = openvino.convert_model(_export(model, inputs))
    _name(graph, inputs)
    return graph


def _export(model: nn.Module, inputs: ExportInputs) -> Any:
    """Read the model whole.

    `Dim.DYNAMIC` and not a named `Dim`: it takes a longest sequence from the model by itself and
    still refuses a dimension that the model fixes.
    """
    import torch
    from torch.export import Dim

    axes = [
        {axis: Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs.specs
    ]
    return torch.export.export(
        model,
        tuple(inputs.tensors.values()),
        dynamic_shapes=dict(inspect.signature(model.forward).bind(*axes).arguments),
        strict=False,
    )


def _name(graph: Any, inputs: ExportInputs) -> None:
    for port, spec in zip(graph.inputs, inputs.specs, strict=True):
        port.get_tensor().set_names({spec.name})
    graph.reshape({spec.name: _partial_shape(spec.shape) for spec in inputs.specs})
    taken = {spec.name for spec in inputs.specs}
    for port, name in zip(graph.outputs, inputs.output_names, strict=True):
        tensor = port.get_tensor()
        if name not in taken and not tensor.get_names() & taken:
            tensor.set_names({name})
            taken.add(name)


def _partial_shape(shape: tuple[int | str, ...]) -> Any:
    import openvino

    return openvino.PartialShape([-1 if isinstance(size, str) else size for size in shape])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep a conversion's chatter off the terminal; an error carries what matters of it."""
    root = logging.getLogger()
    # The converter gives the root logger a level and a handler of its own, and leaves both there
    # when it fails.
    before = (root.level, list(root.handlers), list(root.filters))
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    complaints = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaints):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                # Told to OpenVINO, which calls torch.jit.trace; the other kind is what tracing is.
                warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
                warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
                _ignore_tracer_warnings()
                # An RNN rewrites its list of weights with the same tensors.
                message = r"The tensor attributes? self\..*_flat_weights"
                warnings.filterwarnings("ignore", message, UserWarning)
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            root.level, root.handlers, root.filters = before
    sys.stderr.write(complaints.getvalue())  # warnings, of a conversion that went well


def _ignore_tracer_warnings() -> None:
    import torch

    category = torch.jit.TracerWarning  # type: ignore[attr-defined]  # torch does not declare it
    warnings.filterwarnings("ignore", category=category)


def explain(error: Exception, *, is_traced: bool) -> str:
    """Say what a user can do about an exception out of a conversion."""
    text = str(error)
    if "data-dependent" in text:
        found = "the model branches on the values of a tensor"
        action = "Write the branch with torch.where or torch.cond."
        return build_message("openvino", found, "the same operators for every input", action)
    if "specialized it to be a constant" in text or "inferred to be a constant" in text:
        lines = [line.strip(" -") for line in text.splitlines() if "constant (" in line]
        found = f"the model fixes a dimension that varies: {lines[0]}"
        action = (
            "Take sizes from the tensors (x.shape[0], -1) instead of numbers; for a recurrent "
            "layer set export.openvino.trace = true."
        )
        return build_message("openvino", found, "every batch size and length", action)
    marker = "No conversion rule found for operations:"
    if marker in text:
        operators = text.partition(marker)[2].strip().splitlines()[0]
        found = f"OpenVINO has no rule for {operators}"
        return build_message("openvino", found, "operators that it knows")
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()] or ["no message"]
    # OpenVINO's messages begin with the place in its sources, and say at the end what happened.
    said = lines[-1] if lines[0].startswith("Check ") else lines[0]
    found = f"{type(error).__name__}: {said}"
    return build_message("openvino", found, "a model that OpenVINO can express")
