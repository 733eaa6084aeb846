"""A problem that trains in a moment, to see a plugin at work in a real run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.pipeline import TrainingResult, train
from dovetail.registry import Registry

_NUM_TRAIN, _NUM_VALIDATION = 24, 8


class Train:
    """Trains a tiny tabular classifier with what a test wants different.

    Args:
        directory: Folder for the runs.
        registry: Where backends come from.
    """

    def __init__(self, directory: Path, registry: Registry) -> None:
        self.directory = directory
        self.registry = registry

    def __call__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        model: nn.Module | None = None,
        data: Any = None,
        **sections: Mapping[str, Any],
    ) -> TrainingResult:
        """Train, and return what a run returns.

        Args:
            config: Tables on top of the defaults: a classification of two classes, one epoch of
                three batches on the CPU, and no backend but the built-in collator and accumulator.
            model: A model in place of the small classifier, which takes `features` `(batch, 4)`.
            data: Splits in place of 24 and 8 samples of `features` and `labels`.
            sections: More tables by name: `collate={"use": "scaled"}`.

        Raises:
            DovetailError: What a run raises.
        """
        tables = merge(merge(self.defaults(), config or {}), sections)
        return train(
            tables,
            model=build_classifier() if model is None else model,
            data=build_splits() if data is None else data,
            registry=self.registry,
        )

    def defaults(self) -> dict[str, Any]:
        """Return the tables that a test's own are laid on."""
        return {
            "run": {"name": "test", "dir": str(self.directory), "report": False},
            "task": {"modality": "tabular", "kind": "classification", "num_classes": 2},
            "train": {"epochs": 1, "batch_size": 8, "lr": 0.05, "device": "cpu"},
            "log": {"system_s": 0},  # when its records come is another matter each time
        }


class Classifier(nn.Module):
    """Two layers from `features` to the logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(batch, 2)` of features `(batch, 4)`."""
        logits: Tensor = self.layers(features)
        return logits


def build_classifier() -> nn.Module:
    """Return a model whose weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier()


def build_splits() -> dict[str, list[dict[str, Any]]]:
    """Return samples of two classes that a line parts."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(_NUM_TRAIN + _NUM_VALIDATION, 4, generator=generator)
    samples = [{"features": row, "labels": int(row.sum() > 0)} for row in features]
    return {"train": samples[:_NUM_TRAIN], "validation": samples[_NUM_TRAIN:]}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid on it, table into table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        is_table = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if is_table else value  # type: ignore[arg-type]
    return merged
