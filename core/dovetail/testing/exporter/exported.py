"""Exports a subject as a bundle does, and holds an artifact against the model it came from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dovetail.bundle.golden import FILE_NAME as GOLDEN
from dovetail.bundle.golden import GoldenCase, write_golden
from dovetail.bundle.manifest import (
    FILE_NAME,
    ArtifactEntry,
    Manifest,
    describe_file,
    render_manifest,
)
from dovetail.bundle.reference import Reference, build_reference, serve
from dovetail.bundle.served import served_in_eval
from dovetail.testing.suite import ConformanceError

if TYPE_CHECKING:
    from torch import nn

    from dovetail.bundle.golden import Arrays
    from dovetail.testing.exporter.models import Subject
    from dovetail.types import Artifact, Exporter

_EXAMPLE = (4, 9)
OTHER_SIZES = ((1, 5), (2, 12), (3, 7), (8, 17))
"""Batch sizes and lengths that no artifact was exported with."""


@dataclass(frozen=True)
class Exported:
    """An artifact, held in memory, and what it is compared with."""

    subject: Subject
    reference: Reference
    known: GoldenCase
    """A batch of the sizes that the artifact was exported with."""
    others: tuple[GoldenCase, ...]
    """Batches of `OTHER_SIZES`."""
    padded: GoldenCase | None
    """A batch with padding, of the sizes that the artifact was exported with."""
    artifact: Artifact
    main: str
    """Name of the main file."""
    files: Mapping[str, bytes]
    """The files that the artifact names, by their names in its folder."""
    strays: tuple[str, ...]
    """Files that it wrote and does not name, or names and did not write."""
    changes: tuple[str, ...]
    """What of the model is not as it was."""

    def place(self, folder: Path) -> Path:
        """Write the artifact's files into a folder, as a bundle moves them; return the main one."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder / self.main


def export_subject(exporter: Exporter, subject: Subject) -> Exported:
    """Export a subject the way `build_bundle` does.

    Raises:
        ConformanceError: The main file is not there.
    """
    example = subject.draw(*_EXAMPLE, False)
    golden = [subject.draw(*sizes, False) for sizes in (*OTHER_SIZES, _EXAMPLE)]
    if subject.has_mask:
        golden.append(subject.draw(*_EXAMPLE, True))
    served = serve(subject.build_model(), subject.task, example, subject.transform)
    with (
        tempfile.TemporaryDirectory(prefix="dovetail-") as root,
        served_in_eval(served) as held,
    ):
        reference = build_reference(held, subject.task, example, golden, subject.recipe)
        before = _state_of(held)
        folder = Path(root).resolve() / "artifact"
        folder.mkdir()
        artifact = exporter.export(held, reference.inputs, folder)
        changes = tuple(_changes(before, _state_of(held)))
        files, strays = _collect(artifact, folder)
    cases = reference.cases
    return Exported(
        subject=subject,
        reference=reference,
        known=cases[len(OTHER_SIZES)],
        others=cases[: len(OTHER_SIZES)],
        padded=cases[-1] if subject.has_mask else None,
        artifact=artifact,
        main=artifact.path.relative_to(folder).as_posix(),
        files=files,
        strays=strays,
        changes=changes,
    )


def _collect(artifact: Artifact, folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    root = folder.parent
    written = {p for p in root.rglob("*") if p.is_symlink() or p.is_file()}
    named = set(artifact.files)
    strays = [f"{_short(p, folder)} is not named" for p in sorted(written - named)]
    strays += [f"{_short(p, folder)} is not there" for p in sorted(named - written)]
    strays += [f"{p.name} is a link" for p in sorted(written) if p.is_symlink()]
    strays += [f"{p.name} lies outside" for p in sorted(named) if folder not in p.parents]
    if artifact.path not in named:
        strays.append(f"the main file {artifact.path.name} is not among the files")
    if artifact.path not in written or folder not in artifact.path.parents:
        raise ConformanceError(f"its main file {str(artifact.path)!r} is not in the folder")
    plain = {p for p in {*named, artifact.path} & written if not p.is_symlink()}
    inside = [p for p in sorted(plain) if folder in p.parents]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in inside}, tuple(strays)


def _short(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Return what of a model an exporter could leave behind otherwise."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"training mode of module {name!r}"] = module.training
        hooks = {key: list(held) for key, held in vars(module).items() if "hook" in key and held}
        state[f"hooks of module {name!r}"] = hooks
        state[f"class of module {name!r}"] = type(module)
        state[f"forward of module {name!r}"] = "forward" in vars(module)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        kept = (value.device, value.dtype, value.requires_grad, value.data_ptr())
        state[f"device or storage of {name!r}"] = kept
        state[f"values of {name!r}"] = _bits_of(value)
        state[f"gradient of {name!r}"] = None if value.grad is None else value.grad.data_ptr()
    state["mode of gradients in torch"] = torch.is_grad_enabled()
    state["default type of torch"] = torch.get_default_dtype()
    return state


def _bits_of(value: torch.Tensor) -> bytes:
    # Not by NumPy alone, which has no bfloat16.
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for what in {**before, **after}:
        if what not in before or what not in after:
            yield f"{what} {'appeared' if what in after else 'disappeared'}"
        elif before[what] != after[what]:
            yield f"{what} changed"


def compare(wanted: Arrays, found: Arrays) -> tuple[float, str]:
    """Return the largest error relative to the largest output, or why there is none.

    Outputs that are missing, and their types, are another check's.
    """
    worst = 0.0
    for name, expected in wanted.items():
        actual = np.asarray(found.get(name, expected))
        if actual.shape != expected.shape:
            return 0.0, f"output {name!r} has shape {actual.shape} instead of {expected.shape}"
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        if not np.isfinite(difference).all():
            return 0.0, f"output {name!r} holds NaN or infinities"
        largest = float(np.abs(expected).max(initial=0)) or 1.0
        worst = max(worst, float(difference.max(initial=0)) / largest)
    return worst, ""


def write_bundle(exported: Exported, exporter: Exporter, name: str, folder: Path) -> None:
    """Write a bundle of this one artifact, as `build_bundle` does, without its proof."""
    exported.place(folder / "artifacts")
    write_golden(folder / GOLDEN, exported.reference.cases)
    entry = ArtifactEntry(
        path=f"artifacts/{exported.main}",
        files=tuple(f"artifacts/{file}" for file in exported.files),
        metadata=dict(exported.artifact.metadata),
        options={},
        # Whether these two are what they should be is a check of its own.
        requirements=tuple(map(str, exporter.requirements)),
        carries_code=bool(exporter.carries_code),
        export_seconds=0.0,
        limit=exported.reference.limit,
        cases=(),
    )
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    manifest = Manifest(
        task=exported.subject.task,
        created="",
        precision=exported.reference.precision,
        inputs=exported.reference.inputs.specs,
        outputs=exported.reference.outputs,
        versions={},
        artifacts={name: entry},
        files={p.relative_to(folder).as_posix(): describe_file(p) for p in paths},
    )
    (folder / FILE_NAME).write_bytes(render_manifest(manifest))
