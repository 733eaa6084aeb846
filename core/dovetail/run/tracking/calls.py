"""Turns the records of a metric log into calls of a tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from dovetail.run.tracking.reading import parse_record
from dovetail.types import Capability, Tracker

Row: TypeAlias = tuple[int, Mapping[str, float]]

MAX_ROWS = 500
"""Records that a tracker gets in one call, if it takes several."""

_HOLDS: dict[str, Capability] = {
    "params": "params",
    "figure": "figures",
    "text": "texts",
    "histogram": "histograms",
    "artifact": "artifacts",
    "graph": "graphs",
}
"""What a tracker must be able to hold to be given a kind of record."""


@dataclass(frozen=True)
class TrackerCall:
    """One call of a tracker, made of one record of the log or of several."""

    act: Callable[[], None] | None
    """Makes it; `None` for a record that the tracker has no place for."""
    end: int
    """Place of the log behind the records, bytes."""
    file: str = ""
    """The file that is handed over, for a record that refers to one."""


class CallReader:
    """Reads a metric log as calls of one tracker.

    Args:
        path: The log; the files that its records refer to lie beside it.
        tracker: Who is called.
    """

    def __init__(self, path: Path, tracker: Tracker) -> None:
        self._path = path
        self._tracker = tracker

    def read(self, offset: int) -> Iterator[TrackerCall]:
        """Yield the calls of all whole records behind `offset`.

        Rows of metrics become one call where the tracker has `log_many`.
        """
        log_many: Any = getattr(self._tracker, "log_many", None)
        rows: list[Row] = []
        with self._path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                record = parse_record(line) or {}
                row = _row_of(record)
                if rows and (row is None or len(rows) == MAX_ROWS):
                    yield TrackerCall(partial(log_many, rows), offset)
                    rows = []
                offset += len(line)
                if row is None:
                    yield TrackerCall(self._act_on(record), offset, str(record.get("file", "")))
                elif log_many is None:
                    yield TrackerCall(partial(self._tracker.log, row[1], row[0]), offset)
                else:
                    rows.append(row)
        if rows:
            yield TrackerCall(partial(log_many, rows), offset)

    def _act_on(self, record: Mapping[str, Any]) -> Callable[[], None] | None:
        kind = str(record.get("kind"))
        # A tracker that does not hold settings takes no harm from `log_params`.
        if kind != "params" and _HOLDS.get(kind) not in self._tracker.capabilities:
            return None
        # Nobody can take what a damaged record lacks, however often it is tried.
        needed = ("params",) if kind == "params" else ("name", "file")
        if any(field not in record for field in needed):
            return None
        return partial(self._hand_over, kind, record)

    def _hand_over(self, kind: str, record: Mapping[str, Any]) -> None:
        tracker: Any = self._tracker
        if kind == "params":
            tracker.log_params(record["params"])
            return
        name, path = record["name"], self._path.parent / record["file"]
        step = record.get("step", 0)
        if kind == "figure":
            tracker.log_figure(name, path, step)
        elif kind == "text":
            tracker.log_text(name, path.read_text(encoding="utf-8"), step)
        elif kind == "histogram":
            drawn = json.loads(path.read_text(encoding="utf-8"))
            tracker.log_histogram(name, drawn["counts"], drawn["edges"], step)
        elif kind == "graph":
            tracker.log_graph(path)
        else:
            tracker.log_artifact(name, path)


def _row_of(record: Mapping[str, Any]) -> Row | None:
    step, metrics = record.get("step"), record.get("metrics")
    return (step, metrics) if isinstance(step, int) and metrics else None
