"""The bundle of a model that Lightning has trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dovetail.bundle import BundleReport, build_bundle
from dovetail.pipeline.export import EXAMPLE_BATCH_SIZE, PROOF_BATCH_SIZES
from dovetail.preflight import CheckedConfig, build_recipe
from dovetail.run.samples import take_batches, vary_lengths
from dovetail_lightning._data import ConfiguredData


def export_bundle(
    checked: CheckedConfig, model: nn.Module, data: ConfiguredData, directory: Path
) -> BundleReport:
    """Export a model as `[export]` says.

    Args:
        checked: The config with its backends.
        model: What was trained.
        data: Where the examples come from.
        directory: The bundle's folder.

    Raises:
        ConfigError: There are no data.
        ExportError: No format could be exported.
    """
    task = checked.config.task
    chosen = checked.options("export")
    exporters = {name: checked.registry.export(name, task, o) for name, o in chosen.items()}
    splits = data.require()
    split = splits.train if splits.validation is None else splits.validation
    sizes = (EXAMPLE_BATCH_SIZE, *PROOF_BATCH_SIZES)
    batches = take_batches(split, data.collator, data.input_name, sizes)
    if task.modality == "text":
        batches = vary_lengths(batches, data.input_name)
    example, *golden = batches
    return build_bundle(
        model,
        task,
        exporters,
        directory,
        example=example,
        golden=golden,
        transform=data.transform,
        recipe=build_recipe(checked),
        training_config=checked.config.to_dict(),
        options={name: options.model_dump(mode="json") for name, options in chosen.items()},
    )
