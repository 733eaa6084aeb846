from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.registry import Registry
from dovetail.types import RunInfo

for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]  # the tests say what a user has set
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # also where a test is the first to import mlflow


def read_run(directory: Path, uri: str | None = None) -> Any:
    """Return the MLflow run that the run's folder names, read by a client of its own."""
    import json

    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{directory / 'mlflow' / 'mlflow.db'}")
    run_id = json.loads((directory / "mlflow" / "run.json").read_text())["run_id"]
    run = client.get_run(run_id)
    history = {
        key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    artifacts = sorted(_artifacts(client, run_id))
    return SimpleNamespace(
        client=client, id=run_id, info=run.info, data=run.data, history=history, artifacts=artifacts
    )


def _artifacts(client: Any, run_id: str, folder: str | None = None) -> Iterator[str]:
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _artifacts(client, run_id, entry.path)
        else:
            yield entry.path


@pytest.fixture
def read() -> Callable[..., Any]:
    """Reader of what MLflow holds of a run."""
    return read_run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a database that several runs share: its tables are made once."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'shared.db'}"


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    directory = tmp_path / "run"
    directory.mkdir()
    return RunInfo("digits", "2026-01-02-a", directory, {})


@pytest.fixture
def track(run: RunInfo, store: str) -> Callable[..., Any]:
    """Builder of trackers of `run` in the shared store, as a run builds them."""

    def build(**options: Any) -> Any:
        registry = Registry()
        table = {"tracking_uri": store, **options}
        made = registry.build_options("log", "mlflow", table, run.directory)
        return registry.log("mlflow", run, made)

    return build
