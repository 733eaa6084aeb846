"""The exporter: writes OpenVINO IR and runs it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail import Artifact, BundleError, ExportError
from dovetail.errors import build_message

if TYPE_CHECKING:
    from torch import nn

    from dovetail.types import Array, ExportInputs, Runner

_FILE = "model.xml"
_OUTPUTS = ["dovetail", "outputs"]
"""Path of the outputs' names in the model's notes. Tensor names must not repeat in a model, and an
output may be an input, or another output, once more."""

_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}

_RUNTIME_SOURCE = '''\
import json
import sys

sys.modules.setdefault("openvino_telemetry", None)  # openvino then sends nothing
import openvino


def load(path):
    """Return a function from arrays by input name to arrays by output name."""
    core = openvino.Core()
    model = core.read_model(path)
    names = json.loads(model.get_rt_info(["dovetail", "outputs"]).astype(str))
    # Left to itself it computes in bfloat16 where the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: dict(zip(names, compiled(dict(inputs)).to_tuple()))
'''


class OpenvinoExporter:
    """Writes `model.xml` and `model.bin`, with dimensions that vary where the signature says so.

    Weights are stored as they are: OpenVINO's usual float16 would miss the limit of a bundle's
    proof.

    Args:
        is_traced: Record one run of the model instead of reading it whole.
    """

    def __init__(self, *, is_traced: bool = False) -> None:
        self._is_traced = is_traced

    @property
    def requirements(self) -> tuple[str, ...]:
        """OpenVINO, no older than the one that is installed here, and NumPy.

        A release reads what older ones wrote, not what newer ones write.
        """
        return (f"openvino>={importlib.metadata.version('openvino')}", "numpy>=1.26")

    @property
    def carries_code(self) -> bool:
        """OpenVINO IR is a graph of known operators."""
        return False

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Write the graph of `model`.

        Args:
            model: In eval mode on the CPU.
            inputs: Example batch and signature.
            directory: Folder to write into.

        Raises:
            ExportError: The model branches on values, fixes a dimension that varies, or uses an
                operator that OpenVINO lacks.
        """
        openvino = import_openvino()
        from dovetail_openvino._conversion import convert, explain

        path = directory / _FILE
        try:
            graph = convert(model, inputs, is_traced=self._is_traced)
            graph.set_rt_info(json.dumps(list(inputs.output_names)), _OUTPUTS)
            openvino.save_model(graph, str(path), compress_to_fp16=False)
        except Exception as err:
            raise ExportError(explain(err, is_traced=self._is_traced)) from err
        metadata = {"precision": "float32", "frontend": "trace" if self._is_traced else "export"}
        return Artifact("openvino", path, (path, path.with_suffix(".bin")), metadata)

    def load(self, path: Path) -> Runner:
        """Load the model in OpenVINO's runtime on the CPU, in float32, with its telemetry off.

        The runner may be called from several threads; one at a time computes.

        Raises:
            BundleError: The files are damaged, or another program wrote them.
        """
        openvino = import_openvino()
        core = openvino.Core()
        try:
            model = core.read_model(str(path))
            outputs = json.loads(model.get_rt_info(_OUTPUTS).astype(str))
            compiled = core.compile_model(model, "CPU", _FLOAT32)
        except (RuntimeError, ValueError) as err:
            found = f"OpenVINO does not load it ({_last_line(err)})"
            expected = f"{_FILE} and its .bin, as this exporter wrote them"
            raise BundleError(build_message(str(path), found, expected)) from err
        names = {port.get_any_name() for port in compiled.inputs}
        lock = threading.Lock()

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            # The runtime would take zeros for an input that is missing.
            if set(inputs) != names:
                raise ValueError(f"inputs are {sorted(inputs)}; expected {sorted(names)}")
            with lock:
                return dict(zip(outputs, compiled(dict(inputs)).to_tuple(), strict=True))

        return run

    def runtime_source(self) -> str:
        """Return Python source that defines `load(path)`, for who has no dovetail."""
        return _RUNTIME_SOURCE


def import_openvino() -> Any:
    """Return the package, imported so that it reports to nobody."""
    # It sends its first event while it is imported; without the sender it takes a stand-in. None
    # is Python's own word for a module that must not be imported; typeshed knows modules alone.
    is_first = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if is_first:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if is_first:
            del sys.modules["openvino_telemetry"]
    return openvino


def _last_line(error: Exception) -> str:
    """Return the last line of OpenVINO's text, which says what; the first says where."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
