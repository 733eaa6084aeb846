"""Reads the `.wandb` files of W&B runs: what W&B has committed, record by record.

W&B's own process appends to such a file, in offline and in online mode. It is a log in the format
of LevelDB: behind a header of 7 bytes come blocks of 32 KiB with fragments of records, and each
record is a protocol buffer. wandb 0.31 brings no reader for Python.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

_HEADER_BYTES = 7
"""Of the file, and as it happens of each fragment: checksum (4), length (2), kind (1)."""
_BLOCK_BYTES = 2**15
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")


@dataclass(frozen=True)
class HistoryRow:
    """One row of a run's history."""

    number: int
    """W&B's own `_step`, which only grows."""
    values: Mapping[str, Any]
    """Everything in the row, W&B's `_step`, `_runtime` and `_timestamp` among it. Media are
    mappings with a `_type`."""


def find_wandb_files(folder: Path) -> list[Path]:
    """Return the `.wandb` files of the runs in a folder named `wandb`, the oldest run first."""
    found = []
    for path in folder.glob("*run-*/run-*.wandb"):
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            # Of two in one second the later one has a number behind it.
            found.append(((match[1], len(match[2]), match[2]), path))
    return [path for _, path in sorted(found)]


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file, as `wandb.proto.wandb_internal_pb2.Record`.

    The file may be one that is being written or was torn: what is not whole is left out. Checksums
    are not looked at.
    """
    # By name, because neither has types.
    decode = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    damaged = import_module("google.protobuf.message").DecodeError
    with path.open("rb") as file:
        for data in _read_whole(file):
            try:
                yield decode(data)
            except damaged:
                continue


def read_history(path: Path) -> Iterator[HistoryRow]:
    """Yield the rows that are committed to a `.wandb` file."""
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            yield parse_history(record)


def parse_history(record: Any) -> HistoryRow:
    """Return the row of a record of the kind "history"."""
    values: dict[str, Any] = {}
    for item in record.history.item:
        *parents, name = list(item.nested_key) or [item.key]
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = _parse(item.value_json)
    return HistoryRow(int(values.get("_step", record.history.step.num)), values)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_whole(file: BinaryIO) -> Iterator[bytes]:
    """Yield the records of a file, each put together from its fragments."""
    parts: list[bytes] = []
    for kind, data in _read_fragments(file):
        if kind in (_WHOLE, _FIRST):
            parts = []  # what began before and has no end was torn
        elif not parts:
            continue
        parts.append(data)
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)
            parts = []


def _read_fragments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    # The file's header is a part of its first block.
    place = _HEADER_BYTES
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        while place + _HEADER_BYTES <= len(block):
            length = int.from_bytes(block[place + 4 : place + 6], "little")
            kind, start = block[place + 6], place + _HEADER_BYTES
            if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or start + length > len(block):
                break  # nothing was written here yet, or not the whole of it
            yield kind, block[start : start + length]
            place = start + length
        place = 0
