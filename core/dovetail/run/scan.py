"""Reads from a log what a list of runs tells, without parsing the records in between."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.run.tracking.reading import parse_record

_CHUNK_BYTES = 1 << 22


@dataclass
class Scan:
    """What stands at the ends of a log, and its marks in between."""

    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    last_step: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    best_value: float | None = None
    best: dict[str, Any] | None = None
    """The record of the best value."""
    paused_s: float = 0.0
    """Seconds between a stop and the resume after it, summed up."""
    num_resumes: int = 0
    _before: bytes = field(default=b"", repr=False)


def scan_log(path: Path, monitor: str, mode: str) -> Scan:
    """Read a log's ends, its resumes and the best value of a metric.

    The bytes are searched for the few records that matter and only those are parsed, which is a
    hundred times as fast. The file is not mapped into memory: a run that resumes may shorten it.

    Args:
        path: The log.
        monitor: The metric.
        mode: "min" or "max".

    Raises:
        OSError: The log cannot be read.
    """
    scan = Scan()
    for block in _read_blocks(path):
        if scan.first is None:
            scan.first = parse_record(_line_at(block, 0))
        _look_for_best(scan, block, monitor, mode)
        _look_for_resumes(scan, block)
        scan.last_step = _last_of(block, "step") or scan.last_step
        scan.last_evaluation = _last_of(block, "evaluation") or scan.last_evaluation
        scan._before = _line_at(block, len(block) - 1)
    scan.last = parse_record(scan._before)
    return scan


def _read_blocks(path: Path) -> Iterator[bytes]:
    """Yield the log in blocks of whole lines; a line that is still being written is left out."""
    rest = b""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            data = rest + chunk
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                yield data[:end]


def _line_at(block: bytes, position: int) -> bytes:
    start = block.rfind(b"\n", 0, position) + 1
    end = block.find(b"\n", position)
    return block[start:end]


def _last_of(block: bytes, kind: str) -> dict[str, Any] | None:
    # Other writers may put a blank behind the colon.
    for spelled in (f'"kind":"{kind}"', f'"kind": "{kind}"'):
        position = block.rfind(spelled.encode())
        if position >= 0:
            return parse_record(_line_at(block, position))
    return None


def _look_for_best(scan: Scan, block: bytes, monitor: str, mode: str) -> None:
    needle = json.dumps(monitor).encode()
    sign = 1.0 if mode == "min" else -1.0
    best = math.inf if scan.best_value is None else sign * scan.best_value
    place = -1
    position = block.find(needle)
    while position >= 0:
        position += len(needle)
        value = _number_after(block, position)
        # What comes first keeps its place among equals, and the first one counts in any case.
        if value is not None and sign * value < best:
            best, place = sign * value, position
        position = block.find(needle, position)
    record = None if place < 0 else parse_record(_line_at(block, place))
    if record is not None and monitor in record.get("metrics", {}):
        scan.best_value, scan.best = sign * best, record


def _number_after(block: bytes, position: int) -> float | None:
    """Return the finite number of the key that ends here; a value that is a name is none."""
    colon = block[position : position + 2].lstrip()
    if not colon.startswith(b":"):
        return None
    text = block[position : position + 40].partition(b":")[2]
    for end in (b",", b"}"):
        text = text.partition(end)[0]
    try:
        value = float(text)
    except ValueError:  # "NaN" in its quotes
        return None
    return value if math.isfinite(value) else None


def _look_for_resumes(scan: Scan, block: bytes) -> None:
    needle = b'"params"'
    position = block.find(needle)
    while position >= 0:
        start = block.rfind(b"\n", 0, position) + 1
        line = _line_at(block, position)
        before = _line_at(block, start - 1) if start else scan._before
        record, last = parse_record(line), parse_record(before)
        if record is not None and last is not None and record.get("kind") == "params":
            scan.num_resumes += 1
            scan.paused_s += max(0.0, record.get("time", 0.0) - last.get("time", math.inf))
        position = block.find(needle, start + len(line))
