"""Small data, a collator for it and a config, for runs of the whole job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail import TaskSpec, hookimpl
from dovetail.registry import Registry


class StackCollator:
    """Stacks what it is given; enough for tables of numbers."""

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}


class StackPlugin:
    """Collates tables of numbers."""

    @hookimpl
    def dovetail_collate(self, task: TaskSpec) -> StackCollator | None:
        return StackCollator() if task.modality == "tabular" else None


@pytest.fixture
def registry() -> Registry:
    own = Registry()
    own.register(StackPlugin(), hook="collate", name="tabular")
    return own


@pytest.fixture
def splits() -> dict[str, list[tuple[torch.Tensor, int]]]:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(131, 6, generator=generator)
    labels = (features[:, 0] + features[:, 1] > 0).long()
    samples = [(x, int(y)) for x, y in zip(features, labels, strict=True)]
    return {"train": samples[:91], "validation": samples[91:]}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"name": "small", "dir": str(tmp_path / "runs"), "seed": 3},
        "train": {"epochs": 3, "batch_size": 8, "lr": 0.02},
        "accumulate": {"exact": {"steps": 4}},
    }
