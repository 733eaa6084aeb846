"""One format's way into a bundle: exported into its own folder, checked, moved in, proven."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.bundle.golden import FILE_NAME as GOLDEN
from dovetail.bundle.manifest import ArtifactEntry, CaseEntry
from dovetail.bundle.proof import ProofRequest, describe_sizes, prove_artifact
from dovetail.bundle.redaction import plain_values, without_folders
from dovetail.bundle.report import ArtifactReport, FormatFailure
from dovetail.bundle.specs import BATCH
from dovetail.errors import DovetailError, ExportError, build_message

if TYPE_CHECKING:
    from dovetail.bundle.reference import Reference
    from dovetail.bundle.served import ServedModel
    from dovetail.task import TaskSpec
    from dovetail.types import Artifact, Exporter

ARTIFACTS = "artifacts"
"""Folder of a bundle that holds every format's files."""


@dataclass(frozen=True)
class Exported:
    """A format that was exported and awaits its proof."""

    name: str
    """Name of the exporter, as the config names it."""
    exporter: Exporter
    path: str
    """Main file, relative to the bundle."""
    files: tuple[str, ...]
    metadata: Mapping[str, Any]
    seconds: float


def export_format(
    name: str, exporter: Exporter, served: ServedModel, reference: Reference, folder: Path
) -> Exported | FormatFailure:
    """Let one exporter write its files and move them into the bundle.

    Args:
        name: Name of the exporter, as the config names it.
        exporter: The exporter.
        served: The model, in eval mode on the CPU.
        reference: Example batch and signature.
        folder: The unfinished bundle.
    """
    start = time.perf_counter()
    staging = folder / "staging"
    staging.mkdir()
    try:
        served.eval()  # whatever the exporter before this one did
        artifact = exporter.export(served, reference.inputs, staging)
        files = _move_in(artifact, staging, folder / ARTIFACTS)
    except Exception as err:
        remedy = f"Change the model as the reason says, or take {name!r} out of export.use."
        return FormatFailure(name, "export", _reason(err), remedy)
    finally:
        shutil.rmtree(staging)
    main = artifact.path.relative_to(staging).as_posix()
    metadata = plain_values({"format": artifact.format, **artifact.metadata})
    seconds = time.perf_counter() - start
    return Exported(name, exporter, f"{ARTIFACTS}/{main}", files, metadata, seconds)


def _move_in(artifact: Artifact, staging: Path, target: Path) -> tuple[str, ...]:
    written = {p.relative_to(staging) for p in staging.rglob("*") if p.is_symlink() or p.is_file()}
    declared = {p.relative_to(staging) for p in (artifact.path, *artifact.files)}
    if written != declared:
        found = f"wrote {_names(written)} and names {_names(declared)}"
        raise ExportError(build_message("exporter", found, "an artifact that names its files"))
    for name in sorted(written):
        if (staging / name).is_symlink() or (target / name).exists():
            kind = "a link" if (staging / name).is_symlink() else "another format's file"
            raise ExportError(build_message("exporter", f"{name.as_posix()!r} is {kind}"))
    for name in sorted(written):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    return tuple(f"{ARTIFACTS}/{name.as_posix()}" for name in sorted(written))


def _names(paths: set[Path]) -> str:
    return ", ".join(sorted(p.as_posix() for p in paths)) or "nothing"


def _reason(error: Exception) -> str:
    text = str(error).strip() or "no message"
    if not isinstance(error, DovetailError):
        text = f"{type(error).__name__}: {text}"
    return _sentence(text)


def _sentence(text: str) -> str:
    return without_folders(text if text.endswith((".", "?", "!")) else f"{text}.")


def prove_format(
    exported: Exported,
    task: TaskSpec,
    options: Mapping[str, Any],
    reference: Reference,
    folder: Path,
) -> tuple[ArtifactEntry, ArtifactReport] | FormatFailure:
    """Prove one format, and remove its files if that fails.

    Args:
        exported: The format.
        task: What the model was trained for.
        options: Options its exporter was made with.
        reference: What it must agree with.
        folder: The unfinished bundle.
    """
    start = time.perf_counter()
    artifact, golden = folder / exported.path, folder / GOLDEN
    request = ProofRequest(exported.name, task.to_dict(), options, artifact, golden)
    labels = [describe_sizes(sizes) for sizes in reference.sizes]
    proof = prove_artifact(request, reference.limit, labels)
    if proof.problem:
        _remove(exported, folder)
        remedy = (
            "Look for sizes or branches that were fixed at export, or take "
            f"{exported.name!r} out of export.use."
        )
        reason = _sentence(f"the artifact {proof.problem}")
        return FormatFailure(exported.name, "proof", reason, remedy)
    entry = ArtifactEntry(
        path=exported.path,
        files=exported.files,
        metadata=dict(exported.metadata),
        options=dict(options),
        requirements=exported.exporter.requirements,
        carries_code=exported.exporter.carries_code,
        export_seconds=round(exported.seconds, 3),
        limit=reference.limit,
        cases=tuple(
            CaseEntry(sizes=dict(sizes), max_error=error)
            for sizes, error in zip(reference.sizes, proof.errors, strict=True)
        ),
    )
    report = ArtifactReport(
        format=exported.name,
        size_bytes=sum((folder / name).stat().st_size for name in exported.files),
        max_error=max(proof.errors),
        batch_sizes=tuple(sizes[BATCH] for sizes in reference.sizes if BATCH in sizes),
        seconds=exported.seconds + time.perf_counter() - start,
    )
    return entry, report


def _remove(exported: Exported, folder: Path) -> None:
    for name in exported.files:
        path = folder / name
        path.unlink()
        while path.parent != folder / ARTIFACTS and not any(path.parent.iterdir()):
            path = path.parent
            path.rmdir()
