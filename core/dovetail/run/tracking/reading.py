"""Reads a metric log, also one that is being written."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.errors import RunError, build_message
from dovetail.run.tracking.log import LOG_NAME

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, also of one that is being written.

    Args:
        path: The log, or the folder of the run.

    Raises:
        RunError: There is no log, or it cannot be read.
    """
    path = path / LOG_NAME if path.is_dir() else path
    try:
        file = path.open("rb")
    except OSError as err:
        where = f"metric log {str(path)!r}"
        raise RunError(build_message(where, f"cannot be read: {err.strerror}")) from err
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = parse_record(line)
            if record is not None:
                yield record
            else:
                text = build_message(f"metric log {str(path)!r} line {number}", "holds no record")
                warnings.warn(text, stacklevel=2)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, spelled-out numbers as numbers again.

    A line that a failing disk has damaged holds none; the others stay readable.
    """
    try:
        record: dict[str, Any] = json.loads(line)
        if metrics := record.get("metrics"):
            record["metrics"] = {
                k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in metrics.items()
            }
    except (ValueError, AttributeError):
        return None
    return record


def read_metrics(run: str | Path, *, system: bool = False) -> Any:
    """Return the metrics of a run as a table, one row per step or evaluation.

    Args:
        run: The run's folder or its `metrics.jsonl`; it may still be written to.
        system: Return the rows of the system metrics instead: memory, utilisation, throughput.

    Returns:
        A pandas or polars `DataFrame` where one of them is installed, else a dictionary of NumPy
        arrays. Columns: `kind`, `step`, `epoch`, `micro_step`, `items`, `time` (seconds since the
        epoch of Unix) and one float column per metric, NaN where a row has none.

    Raises:
        RunError: There is no metric log.
    """
    import numpy as np

    records = [
        r
        for r in read_records(Path(run))
        if "metrics" in r and (r.get("kind") == "system") == system
    ]
    axes = ("kind", "step", "epoch", "micro_step", "items", "time")
    names = list(dict.fromkeys(name for r in records for name in r["metrics"]))
    columns: dict[str, Any] = {
        axis: np.array([math.nan if r.get(axis) is None else r[axis] for r in records])
        for axis in axes
    }
    for name in names:
        columns[name] = np.array([r["metrics"].get(name, math.nan) for r in records], dtype=float)
    for library in ("pandas", "polars"):
        try:
            module = __import__(library)
        except ImportError:
            continue
        return module.DataFrame(columns)
    return columns
