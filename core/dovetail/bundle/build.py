"""Builds a bundle beside its final place and moves it there once it is proven."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dovetail import __version__
from dovetail.bundle.attempt import ARTIFACTS, Exported, export_format, prove_format
from dovetail.bundle.card import render_card
from dovetail.bundle.golden import FILE_NAME as GOLDEN
from dovetail.bundle.golden import write_golden
from dovetail.bundle.manifest import (
    FILE_NAME,
    ArtifactEntry,
    FailureEntry,
    Manifest,
    describe_file,
    render_manifest,
)
from dovetail.bundle.reader import open_bundle
from dovetail.bundle.redaction import plain_values
from dovetail.bundle.reference import Reference, build_reference, serve
from dovetail.bundle.report import ArtifactReport, BundleReport, FormatFailure
from dovetail.bundle.served import ServedModel, check_weights, served_in_eval
from dovetail.errors import BundleError, ExportError, build_message, join_problems

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dovetail.task import TaskSpec
    from dovetail.types import Exporter, Recipe

Progress: TypeAlias = Callable[[str, str], None]
"""Told a format and what happens to it: "export", "proof", "proven" or "failed"."""


def build_bundle(
    model: nn.Module,
    task: TaskSpec,
    exporters: Mapping[str, Exporter],
    destination: Path,
    *,
    example: Mapping[str, Tensor],
    golden: Sequence[Mapping[str, Tensor]],
    transform: nn.Module | None = None,
    recipe: Recipe | None = None,
    training_config: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> BundleReport:
    """Export a trained model to every format, prove each, and keep those that agree with it.

    Args:
        model: The trained model, on any device, in any mode, compiled or not. It is given back as
            it was.
        task: What it was trained for.
        exporters: Exporters by the name under which they are installed.
        destination: Folder of the bundle; there must be nothing.
        example: A collated batch of at least two samples, by input name; other keys are left out.
        golden: Collated batches of real samples that the formats are proven with. Every dimension
            that varies must have a size in one of them that the example does not have.
        transform: The collator's `device_transform`: takes and returns the first input.
        recipe: How the model is rebuilt, where it came from an import path.
        training_config: The run's settings, kept beside the model. Absolute paths are shortened.
        options: Options each exporter was made with, by its name; a fresh process makes it again.
        progress: Called with a format's name and its stage.

    Raises:
        BundleError: There is something at the destination, or it cannot be written.
        ExportError: The weights are not finite, the batches do not show what varies, or no format
            was left. Nothing stands at the destination then.
        ModelError: The model does not take the batch.
    """
    target = Path(destination)
    _check_free(target)
    if not exporters:
        raise ExportError(build_message("config export.use", "names no format", "at least one"))
    say: Progress = progress or (lambda name, stage: None)
    with _folder_beside(target) as folder:
        with served_in_eval(serve(model, task, example, transform)) as served:
            check_weights(served)
            reference = build_reference(served, task, example, golden, recipe)
            exports, failures = _export_all(served, reference, exporters, folder, say)
        write_golden(folder / GOLDEN, reference.cases)
        entries: dict[str, ArtifactEntry] = {}
        reports: list[ArtifactReport] = []
        for exported in exports:
            say(exported.name, "proof")
            chosen = plain_values((options or {}).get(exported.name, {}))
            result = prove_format(exported, task, chosen, reference, folder)
            say(exported.name, "failed" if isinstance(result, FormatFailure) else "proven")
            if isinstance(result, FormatFailure):
                failures.append(result)
            else:
                entries[exported.name], report = result
                reports.append(report)
        if not entries:
            problems = [str(failure) for failure in failures]
            raise ExportError(join_problems("No format could be exported", problems))
        manifest = _describe(task, reference, entries, failures)
        sources = {e.name: _runtime_source(e.exporter) for e in exports if e.name in entries}
        _write_texts(folder, manifest, sources, training_config or {})
        _move_into_place(folder, target)
    return BundleReport(target, tuple(reports), tuple(failures))


def _export_all(
    served: ServedModel,
    reference: Reference,
    exporters: Mapping[str, Exporter],
    folder: Path,
    say: Progress,
) -> tuple[list[Exported], list[FormatFailure]]:
    exports: list[Exported] = []
    failures: list[FormatFailure] = []
    for name, exporter in exporters.items():
        say(name, "export")
        result = export_format(name, exporter, served, reference, folder)
        if isinstance(result, FormatFailure):
            say(name, "failed")
            failures.append(result)
        else:
            exports.append(result)
    return exports, failures


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        action = "Choose another folder, or move that one away."
        raise BundleError(build_message(str(target), "is there already", "a free place", action))


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """Make an empty folder beside `target`; whatever is left of it is removed at the end."""
    folder = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        (folder / ARTIFACTS).mkdir(parents=True)
    except OSError as err:
        found = f"cannot be written ({err.strerror})"
        raise BundleError(build_message(str(target), found, "a writable folder")) from err
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _describe(
    task: TaskSpec,
    reference: Reference,
    entries: dict[str, ArtifactEntry],
    failures: Sequence[FormatFailure],
) -> Manifest:
    return Manifest(
        task=task,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        precision=reference.precision,
        inputs=reference.inputs.specs,
        outputs=reference.outputs,
        versions=_versions(entries),
        artifacts=entries,
        failures=tuple(
            FailureEntry(format=f.format, stage=f.stage, reason=f.reason, remedy=f.remedy)
            for f in failures
        ),
    )


def _versions(entries: Mapping[str, ArtifactEntry]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "dovetail": __version__}
    needed = [r for entry in entries.values() for r in entry.requirements]
    for name in ("torch", *(re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in needed)):
        try:
            versions.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue  # a runtime that is not a Python distribution
    return versions


def _runtime_source(exporter: Exporter) -> str:
    source = getattr(exporter, "runtime_source", None)
    return str(source()) if callable(source) else ""


def _write_texts(
    folder: Path, manifest: Manifest, sources: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write what is read by people and servers, then the manifest over all of it."""
    (folder / "configs").mkdir()
    requirements = {r for entry in manifest.artifacts.values() for r in entry.requirements}
    texts = {
        "configs/task_spec.json": _to_json(manifest.task.to_dict()),
        "configs/training_config.json": _to_json(plain_values(config)),
        "requirements.txt": "".join(f"{line}\n" for line in sorted(requirements)),
        "README.md": render_card(manifest, sources, folder),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): describe_file(p) for p in paths}
    complete = manifest.model_copy(update={"files": files})
    (folder / FILE_NAME).write_bytes(render_manifest(complete))


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _move_into_place(folder: Path, target: Path) -> None:
    open_bundle(folder)
    _check_free(target)
    try:
        os.rename(folder, target)
    except OSError as err:  # somebody else was faster
        found = f"cannot be made ({err.strerror})"
        raise BundleError(build_message(str(target), found, "a free place")) from err
