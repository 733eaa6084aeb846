"""Fixtures for authors of plugins. pytest finds them through an entry point.

Every pytest of an environment with dovetail imports this module, so that it must cost nothing:
what is heavy is imported by the fixture that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dovetail.registry import Registry
    from dovetail.testing.training import Train
    from dovetail.types import RunInfo


@pytest.fixture
def dovetail_registry() -> Registry:
    """A registry of its own: what a test registers in it is gone after the test."""
    from dovetail.registry import Registry

    return Registry()


@pytest.fixture
def dovetail_run(tmp_path: Path) -> RunInfo:
    """A run as a tracker sees it, with an empty folder of its own."""
    from dovetail.types import RunInfo

    directory = tmp_path / "dovetail-run"
    directory.mkdir()
    return RunInfo("test", "test-run", directory, {"run.name": "test", "train.lr": 0.05})


@pytest.fixture
def dovetail_train(tmp_path: Path, dovetail_registry: Registry) -> Train:
    """A function that really trains a tiny tabular problem; see `dovetail.testing.training`.

    `dovetail_train({"collate": {"use": "scaled"}})` gives the `TrainingResult`. Plugins that a
    test registers in `dovetail_registry` can be named too.
    """
    from dovetail.testing.training import Train

    return Train(tmp_path / "dovetail-runs", dovetail_registry)
