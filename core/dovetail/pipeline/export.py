"""The trained model as a bundle in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dovetail.pipeline.setup import Setup
from dovetail.run.loader import primary_input
from dovetail.run.samples import vary_lengths

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport

PROOF_BATCH_SIZES = (1, 2, 3, 8)
"""Batch sizes at which every artifact is compared with the trained model."""

EXAMPLE_BATCH_SIZE = 4
"""Batch size of the export itself; none of the sizes of the proof."""


def export_model(
    setup: Setup, model: nn.Module, destination: Path, progress: Callable[[str, str], None]
) -> BundleReport:
    """Export a model with real samples, and prove each artifact.

    Args:
        setup: What the run is made of.
        model: With the weights to export.
        destination: The bundle's folder, which must not exist.
        progress: Called with each format and its stage.

    Raises:
        ExportError: No format could be exported.
    """
    from dovetail.bundle import build_bundle

    splits = setup.splits
    split = splits.train if splits.validation is None else splits.validation
    batches = setup.take_batches(split, (EXAMPLE_BATCH_SIZE, *PROOF_BATCH_SIZES))
    if setup.config.task.modality == "text":
        batches = vary_lengths(batches, primary_input(setup.config.task))
    example, *golden = batches
    return build_bundle(
        model,
        setup.config.task,
        setup.exporters,
        destination,
        example=example,
        golden=golden,
        transform=None if setup.transform is None else setup.transform[1],
        recipe=setup.recipe,
        training_config=setup.config.to_dict(),
        options={
            name: options.model_dump(mode="json")
            for name, options in setup.checked.options("export").items()
        },
        progress=progress,
    )


def choose_destination(run_dir: Path, step: int) -> Path:
    """Return where the bundle goes; a run that was trained on keeps its earlier one."""
    path = run_dir / "bundle"
    return path.with_name(f"bundle-step-{step:06d}") if path.exists() else path
