"""The tracker keeps the contract of the `log` hook."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from dovetail.testing import TrackerSuite


class TestMlflow(TrackerSuite):
    backend = "mlflow"

    def read_back(self, directory: Path) -> list[tuple[int, dict[str, float]]]:
        from mlflow import MlflowClient

        folder = directory / "mlflow"
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        run_id = json.loads((folder / "run.json").read_text())["run_id"]
        metrics = client.get_run(run_id).data.metrics
        rows = [row for key in metrics for row in client.get_metric_history(run_id, key)]
        return [(row.step, {row.key: infinite(row.value)}) for row in rows]


def infinite(value: float) -> float:
    """Return infinity for the number that MLflow holds in its place."""
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value
