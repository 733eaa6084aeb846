"""An exporter whose exports are timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail_timing._stopwatch import measure

if TYPE_CHECKING:
    from torch import nn

    from dovetail import Artifact, Exporter, ExportInputs, Runner


class TimedExporter:
    """Hands everything on to an exporter, and times `export`.

    Args:
        exporter: Who does the work.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def __getattr__(self, name: str) -> Any:
        # What a protocol makes optional, `runtime_source` say, is there if it was there before.
        if name == "_exporter":  # not yet: a copy or a pickle is being made
            raise AttributeError(name)
        return getattr(self._exporter, name)

    @property
    def requirements(self) -> tuple[str, ...]:
        """Those of the exporter."""
        return self._exporter.requirements

    @property
    def carries_code(self) -> bool:
        """Whether the exporter's artifacts do."""
        return self._exporter.carries_code

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Let the exporter write the artifact, and say how long it took."""
        with measure(f"{type(self._exporter).__name__}.export") as timing:
            artifact = self._exporter.export(model, inputs, directory)
            timing.result = f"{sum(file.stat().st_size for file in artifact.files):,} bytes"
        return artifact

    def load(self, path: Path) -> Runner:
        """Load an artifact."""
        return self._exporter.load(path)
