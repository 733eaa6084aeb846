from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from dovetail.testing import TrackerSuite

Rows = list[tuple[int, dict[str, float]]]


class TestTensorboard(TrackerSuite):
    backend = "tensorboard"
    tolerance = 1e-7  # values are float32

    @pytest.fixture(autouse=True)
    def _tensorboard(self) -> None:
        pytest.importorskip("tensorboard")

    def read_back(self, directory: Path) -> Rows:
        """Return what TensorBoard's own reader shows, the values of one event as one row."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        sizes = {"scalars": 0, "tensors": 0, "images": 0}
        events = EventAccumulator(str(directory / "tensorboard"), size_guidance=sizes).Reload()
        rows: dict[tuple[float, int], dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows.setdefault((event.wall_time, event.step), {})[tag] = event.value
        return [(step, rows[when, step]) for when, step in sorted(rows)]


@pytest.mark.usefixtures("wandb_home")
class TestWandb(TrackerSuite):
    backend = "wandb"
    options = MappingProxyType({"mode": "offline"})

    def read_back(self, directory: Path) -> Rows:
        """Return the history of the run from the files of all processes that fed it."""
        from dovetail_plugins.log.wandb_file import find_wandb_files, read_history
        from dovetail_plugins.log.wandb_rows import wait_until_written

        files = find_wandb_files(directory / "wandb")
        wait_until_written(files, timeout_s=60)
        found = [dict(row.values) for file in files for row in read_history(file)]
        numbers = [row["_step"] for row in found]
        assert numbers == sorted(set(numbers)), f"W&B would drop rows of the steps {numbers}"
        return [(row["optimizer_step"], numbers_of(row)) for row in found]


def numbers_of(row: dict[str, object]) -> dict[str, float]:
    """Return the metrics of a row of W&B, without what W&B and the tracker add."""
    added = ("_step", "_runtime", "_timestamp", "optimizer_step")
    return {n: float(v) for n, v in row.items() if isinstance(v, (int, float)) and n not in added}
