"""The model card of a bundle: what it is, what was measured, how it is run and checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dovetail.bundle.golden import FILE_NAME as GOLDEN
from dovetail.bundle.proof import describe_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dovetail.bundle.manifest import ArtifactEntry, Manifest
    from dovetail.task import TensorSpec


def render_card(manifest: Manifest, sources: Mapping[str, str], folder: Path) -> str:
    """Return the README of a bundle, as Markdown.

    Args:
        manifest: What the bundle holds.
        sources: Python source that defines `load(path)` for a format, by the format's name;
            empty for a format without such source.
        folder: The bundle, for the sizes of its files.
    """
    task, versions = manifest.task, manifest.versions
    origin = f"exported from PyTorch {versions['torch']} by dovetail {versions['dovetail']}"
    lines = [
        f"# {escape_markdown(task.name)}",
        "",
        f"A {task.kind} model ({escape_markdown(task.modality)}), {origin} on {manifest.created}.",
        "",
        "## Signature",
        "",
        "| | name | dtype | shape |",
        "|---|---|---|---|",
        *_signature_rows("input", manifest.inputs),
        *_signature_rows("output", manifest.outputs),
        "",
        "## Formats",
        "",
        "Each format ran in its own runtime, in a fresh process, on real samples of shapes that",
        "it was not exported with. The error is the largest difference from the trained model's",
        "outputs, relative to the largest of them.",
        "",
        "| format | file | size | executes code it carries | limit | error by shape |",
        "|---|---|---|---|---|---|",
        *(_format_row(name, entry, folder) for name, entry in manifest.artifacts.items()),
        *_failure_lines(manifest),
        *_usage_lines(manifest, sources),
        "",
        "## Verify",
        "",
        "`dovetail verify .` checks the digest of every file and repeats the measurement above.",
        "",
    ]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Return `text` on one line, with nothing in it that Markdown or HTML would act on."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|>~])", r"\\\1", line)


def _signature_rows(kind: str, specs: Sequence[TensorSpec]) -> list[str]:
    return [
        f"| {kind} | {escape_markdown(s.name)} | {s.dtype} | "
        f"({escape_markdown(', '.join(str(size) for size in s.shape))}) |"
        for s in specs
    ]


def _format_row(name: str, entry: ArtifactEntry, folder: Path) -> str:
    size_bytes = sum((folder / file).stat().st_size for file in entry.files)
    errors = "; ".join(
        f"{escape_markdown(describe_sizes(case.sizes))}: {case.max_error:.1e}"
        for case in entry.cases
    )
    carries = "yes" if entry.carries_code else "no"
    return (
        f"| {escape_markdown(name)} | {escape_markdown(entry.path)} | {_readable(size_bytes)} "
        f"| {carries} | {entry.limit:.0e} | {errors} |"
    )


def _readable(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _failure_lines(manifest: Manifest) -> list[str]:
    if not manifest.failures:
        return []
    rows = (
        f"- {escape_markdown(f.format)}, at its {f.stage}: {escape_markdown(f.reason)}"
        for f in manifest.failures
    )
    return ["", "Asked for and not here:", "", *rows]


def _usage_lines(manifest: Manifest, sources: Mapping[str, str]) -> list[str]:
    names = tuple(spec.name for spec in manifest.inputs)
    lines = []
    for name, source in sources.items():
        if not source:
            continue
        entry = manifest.artifacts[name]
        needs = " ".join(f'"{r}"' for r in entry.requirements)
        lines += [
            "",
            f"## Run {escape_markdown(name)}",
            "",
            f"In this folder, after `pip install {needs}`:",
            "",
            "```python",
            *source.strip().splitlines(),
            "",
            "",
            f"run = load({entry.path!r})",
            f"golden = np.load({GOLDEN!r}, allow_pickle=False)",
            f'outputs = run({{name: golden[f"case0/inputs/{{name}}"] for name in {names!r}}})',
            "for name, values in outputs.items():",
            '    print(name, values.shape, abs(values - golden[f"case0/outputs/{name}"]).max())',
            "```",
        ]
    return lines
