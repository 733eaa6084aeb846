from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

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


@pytest.fixture(scope="module")
def nobody_logged_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give wandb a home of its own, without a login and without settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        wandb = pytest.importorskip("wandb")
        yield
        wandb.teardown()


@pytest.mark.usefixtures("nobody_logged_in")
class TestWandb(TrackerSuite):
    backend = "wandb"
    options = MappingProxyType({"mode": "offline"})
    is_exactly_once = False  # rows of W&B cannot be taken back
    is_durable = False  # a process of W&B's own writes the file, and dies with ours

    def read_back(self, directory: Path) -> Rows:
        """Return the history of each run that was begun in the folder, in the order of beginning.

        The file is complete when it tells of the exit; that of a killed process never does.
        """
        files = [f for f in directory.rglob("*.wandb") if "latest-run" not in f.parts]
        files.sort(key=lambda file: file.stat().st_mtime_ns)
        deadline_s = time.monotonic() + 20
        while "exit" not in (kinds := [kind for kind, _ in read_records(files[-1])]):
            assert time.monotonic() < deadline_s, f"no exit among {len(kinds)} records"
            time.sleep(0.01)
        return [row for file in files for kind, row in read_records(file) if kind == "history"]

    def test_nothing_is_lost_or_doubled_by_a_kill(self) -> None:
        import wandb

        # A process that is started now would share ours of W&B, and a resumed run never does.
        wandb.teardown()
        super().test_nothing_is_lost_or_doubled_by_a_kill()


def read_records(file: Path) -> list[tuple[str, Any]]:
    """Return kind and row of each record of a `.wandb` file.

    The file is a log as LevelDB writes it, behind a header of 7 bytes: blocks of 32 KiB, and
    fragments with a checksum (4 bytes), a length (2), and a kind (whole, first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or not kind:
            place += left
            continue
        if place + 7 + length > len(data):
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            kind_name = record.WhichOneof("record_type")
            items = record.history.item if kind_name == "history" else ()
            paths = [(list(i.nested_key) or [i.key], i.value_json) for i in items]
            row = {path[0]: json.loads(text) for path, text in paths if len(path) == 1}
            step = row.pop("optimizer_step", None)
            numbers = {name: float(v) for name, v in row.items() if not name.startswith("_")}
            found.append((kind_name, (step, numbers)))
    return found
