"""What came of a bundle: a row for each format that was kept, a row for each that failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["export", "proof"]
"""Where a format failed."""


@dataclass(frozen=True)
class ArtifactReport:
    """A format that was exported and proven."""

    format: str
    size_bytes: int
    """Of all files of the artifact."""
    max_error: float
    """Largest error over all golden cases, relative to the largest output."""
    batch_sizes: tuple[int, ...]
    """Batch sizes it was proven at, one per golden case."""
    seconds: float
    """Time of export and proof."""


@dataclass(frozen=True)
class FormatFailure:
    """A format that is not in the bundle, and why."""

    format: str
    stage: Stage
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.format} failed at its {self.stage}: {self.reason} {self.remedy}"


@dataclass(frozen=True)
class BundleReport:
    """A bundle that stands at `path`, at least one format strong."""

    path: Path
    artifacts: tuple[ArtifactReport, ...]
    failures: tuple[FormatFailure, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every format that was asked for is there."""
        return not self.failures
