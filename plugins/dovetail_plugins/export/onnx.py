"""ONNX: one file that ONNX Runtime runs anywhere, without PyTorch."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ExportError, MissingDependencyError, build_message
from dovetail.types import Artifact

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from dovetail.types import Array, ExportInputs, Runner

dovetail_api = 1

_FILE = "model.onnx"

_NATIVE_OPSET = 18
"""What torch translates to; other opsets are converted from it."""

_RUNTIME_FLOORS = {22: "1.21", 23: "1.23"}
"""First ONNX Runtime that runs an opset; 1.20, the first we support, runs 18 to 21."""

_RUNTIME_SOURCE = '''\
import os

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import onnxruntime


def load(path):
    """Return a function from arrays by input name to arrays by output name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))
'''


class Options(PluginOptions):
    """Options of the ONNX exporter."""

    opset: int = Field(default=20, ge=18, le=23)
    """Version of the ONNX operator set. A higher one needs a newer ONNX Runtime."""


class OnnxExporter:
    """Writes `model.onnx`, with dimensions that vary where the signature says so.

    Args:
        options: The opset.
    """

    def __init__(self, options: Options) -> None:
        self._opset = options.opset

    @property
    def requirements(self) -> tuple[str, ...]:
        """ONNX Runtime and NumPy."""
        return (f"onnxruntime>={_RUNTIME_FLOORS.get(self._opset, '1.20')}", "numpy>=1.26")

    @property
    def carries_code(self) -> bool:
        """An ONNX file is a graph of known operators."""
        return False

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Write the graph of `model`.

        Args:
            model: In eval mode on the CPU.
            inputs: Example batch and signature.
            directory: Folder to write into.

        Raises:
            ExportError: The model branches on values, fixes a dimension that varies, uses an
                operator that ONNX lacks, or the installed exporter cannot write the opset.
            MissingDependencyError: The `onnx` extra is not installed.
        """
        _require("onnx", "onnxscript")
        path = directory / _FILE
        try:
            with _quiet():
                _write(model, inputs, path, self._opset)
        except Exception as err:
            raise ExportError(_explain(err)) from err
        self._check(path)
        files = tuple(sorted(directory.glob(f"{_FILE}*")))  # beyond 2 GB weights lie beside it
        return Artifact("onnx", path, files, {"opset": self._opset})

    def _check(self, path: Path) -> None:
        import onnx

        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
            found = f"the exported graph is not valid ({_first_line(err)})"
            action = "Set export.onnx.opset to 20, or update torch and onnxscript."
            raise ExportError(build_message("onnx", found, "a valid graph", action)) from err
        written = _opset_of(onnx.load(path, load_external_data=False))
        if written != self._opset:
            found = f"the installed exporter wrote opset {written}"
            action = f"Set it to {written}, or update torch and onnxscript."
            expected = str(self._opset)
            raise ExportError(build_message("config export.onnx.opset", found, expected, action))

    def load(self, path: Path) -> Runner:
        """Load the file in ONNX Runtime on the CPU, with its telemetry off.

        Raises:
            MissingDependencyError: The `onnx` extra is not installed.
        """
        # Telemetry sends its first event when the library is imported: too early for the call
        # below, which stops the rest in versions that do not know the variable.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        _require("onnxruntime")
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

        return run

    def runtime_source(self) -> str:
        """Return Python source that defines `load(path)`, for who has no dovetail."""
        return _RUNTIME_SOURCE


def _require(*packages: str) -> None:
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            action = 'Run: pip install "dovetail[onnx]"'
            raise MissingDependencyError(
                build_message(
                    "plugin 'onnx'", f"needs {package}, which is not installed", "", action
                )
            )


def _write(model: nn.Module, inputs: ExportInputs, path: Path, opset: int) -> None:
    import torch

    program = torch.export.export(
        model,
        tuple(inputs.tensors.values()),
        dynamic_shapes=_dynamic_shapes(model, inputs),
        strict=False,
    )
    try:
        written = _translate(program, inputs, opset)
    except Exception as err:
        if not _is_opset_mismatch(err):
            raise
        # Releases of torch up to 2.8 at least say that the model is of `opset` before they put in
        # the functions it is made of, which are of 18, and then refuse those.
        from onnxscript import version_converter

        written = _translate(program, inputs, _NATIVE_OPSET)
        version_converter.convert_version(written.model, opset)
    _tidy(written.model, inputs)
    written.save(path, external_data=None)  # beside the file only where it would pass 2 GB


def _translate(program: Any, inputs: ExportInputs, opset: int) -> Any:
    """Return the graph of a program in the operators of ONNX."""
    import torch

    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[spec.name for spec in inputs.specs],
        output_names=list(inputs.output_names),
        opset_version=opset,
        verbose=False,
    )
    assert written is not None  # as no file was named
    return written


def _is_opset_mismatch(err: BaseException | None) -> bool:
    return err is not None and ("Opset mismatch" in str(err) or _is_opset_mismatch(err.__cause__))


def _dynamic_shapes(model: nn.Module, inputs: ExportInputs) -> dict[str, Any]:
    """Mark what varies, by the parameters of forward.

    `Dim.DYNAMIC` and not a named `Dim`: it takes a longest sequence from the model by itself and
    still refuses a dimension that the model fixes. The proof runs what the names promise.
    """
    from torch.export import Dim

    axes = [
        {axis: Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs.specs
    ]
    return dict(inspect.signature(model.forward).bind(*axes).arguments)


def _tidy(graph: Any, inputs: ExportInputs) -> None:
    """Name the dimensions as the signature does and drop notes that hold this machine's paths."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.graph.inputs, inputs.specs, strict=True):
        for axis, name in enumerate(spec.shape):
            if isinstance(name, str):
                names[str(value.shape[axis])] = name
                value.shape[axis] = name
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for function in graph.functions.values():
        function.metadata_props.clear()
    outputs = [value for node in graph.graph.all_nodes() for value in node.outputs]
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.graph.inputs, *graph.graph.initializers.values(), *outputs):
        value.metadata_props.clear()
        for axis, size in enumerate(value.shape or ()):
            if str(size) in names and not isinstance(size, int):
                value.shape[axis] = names[str(size)]


_CHATTY = (
    "torch.onnx",
    "torch.fx.experimental.recording",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers of torch that tell of an export what its error tells too."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep an export's chatter off the terminal; an error carries what matters of it."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    complaints = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaints):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                # An RNN rewrites its list of weights with the same tensors.
                message = r"The tensor attributes? self\..*_flat_weights"
                warnings.filterwarnings("ignore", message, UserWarning)
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    sys.stderr.write(complaints.getvalue())  # warnings, of an export that went well


def _explain(error: Exception) -> str:
    """Say what a user can do about an exception out of torch's exporter."""
    text = str(error)
    kind = type(error).__name__
    if "data-dependent" in text:
        found = f"the model branches on the values of a tensor{_raising_code(text)}"
        action = "Write the branch with torch.where or torch.cond."
        return build_message("onnx", found, "the same operators for every input", action)
    if "specialized it to be a constant" in text or "inferred to be a constant" in text:
        lines = [line.strip(" -") for line in text.splitlines() if "constant (" in line]
        found = f"the model fixes a dimension that varies: {lines[0]}"
        action = "Take sizes from the tensors (x.shape[0], -1) instead of numbers."
        return build_message("onnx", found, "every batch size and length", action)
    return build_message("onnx", f"{kind}: {_first_line(error)}", "a model ONNX can express")


def _raising_code(text: str) -> str:
    """Return the model's line that torch names, in brackets, or nothing."""
    _, _, after = text.partition("The following call raised this error:")
    code = [line.strip() for line in after.strip().partition("\n\n")[0].splitlines()]
    return f" (`{code[-1]}`)" if code and code[-1] else ""


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _opset_of(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


@hookimpl
def dovetail_export(options: Options) -> OnnxExporter:
    """Make the exporter."""
    return OnnxExporter(options)
