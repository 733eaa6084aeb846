"""Knows which rows of a W&B run are there already, so that none is committed twice.

W&B's own process writes rows some time after they were handed over, and none can be taken back.
After a crash only its files tell which have arrived.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail_plugins.log.wandb_file import parse_history, read_records

AXIS = "optimizer_step"
"""Name of the value that holds the optimizer step in each row."""

_OF_WANDB = frozenset({"_step", "_runtime", "_timestamp", "_wandb"})
_POLL_S = 0.05
_SETTLED_S = 3.0


def identity(values: Mapping[str, Any]) -> bytes:
    """Return what a row is known by: its names and values, those of W&B itself left out.

    NaN equals NaN, and a file that was logged is known by its digest.
    """
    plain = {name: _plain(value) for name, value in values.items() if name not in _OF_WANDB}
    text = json.dumps(plain, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "sha256" in value:
            return [value.get("_type"), value["sha256"]]
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    try:
        # W&B writes 1.0 as 1 and -0.0 as -0, and NaN as a name.
        return repr(float(value) + 0.0)
    except (TypeError, ValueError, OverflowError):
        return str(value)


@dataclass
class KnownRows:
    """The rows that W&B has of a run, and the number it gives to the next one."""

    next_number: int = 0
    """`_step` of the next row. Rows with a lower one than the last would be dropped by W&B."""
    num_unseen: int = 0
    """Rows that the server has and no file: the next ones that are given and are not known."""
    rows: Counter[bytes] = field(default_factory=Counter)
    """How often each row is there, by its identity."""
    artifacts: set[str] = field(default_factory=set)
    """Digests of the artifacts that are there."""

    def take(self, values: Mapping[str, Any]) -> bool:
        """Return whether a row is there; one copy of it is used up by that."""
        if self.rows:
            key = identity(values)
            num_copies = self.rows.pop(key, 0)
            if num_copies > 1:
                self.rows[key] = num_copies - 1
            if num_copies:
                return True
        if self.num_unseen:
            self.num_unseen -= 1
            return True
        return False


def read_known(files: Iterable[Path], starting_step: int | None = None) -> KnownRows:
    """Return what earlier processes have left of a run.

    Offline, whatever is in the files is there. Online, the server has the rows below
    `starting_step`; the others must be sent again, and W&B goes on with that number. Rows that the
    process before had sent without having written them to its file are those that come next.

    Args:
        files: `.wandb` files of the run, the oldest first.
        starting_step: The number that an online run goes on with; `None` offline.
    """
    rows: list[tuple[int, bytes]] = []
    artifacts: set[str] = set()
    is_ended = True
    for path in files:
        left, is_ended = _read_file(path, artifacts)
        if left:
            # A process that went on from a lower number knew that the server lacks the rest.
            rows = [row for row in rows if row[0] < left[0][0]] + left
    last = rows[-1][0] if rows else -1
    if starting_step is None:
        return KnownRows(last + 1, 0, Counter(key for _, key in rows), artifacts)
    held = Counter(key for number, key in rows if number < starting_step)
    num_unseen = 0 if is_ended else max(0, starting_step - last - 1)
    return KnownRows(starting_step, num_unseen, held)  # the server knows artifacts by itself


def _read_file(path: Path, artifacts: set[str]) -> tuple[list[tuple[int, bytes]], bool]:
    rows, is_ended = [], False
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = parse_history(record)
            if AXIS in row.values:
                rows.append((row.number, identity(row.values)))
        elif kind == "artifact":
            artifacts.add(f"{record.artifact.name}:{record.artifact.digest}")
        is_ended |= kind == "exit"
    return rows, is_ended


def wait_until_written(files: Iterable[Path], timeout_s: float = 10.0) -> None:
    """Wait until nobody writes to files of earlier processes.

    W&B's own process outlives one that was killed for a second or two, and goes on writing.
    """
    is_open = _is_open if Path("/proc/self/fdinfo").is_dir() else _is_fresh
    deadline_s = time.monotonic() + timeout_s
    for path in files:
        while is_open(path) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _is_fresh(path: Path) -> bool:
    """Return whether a file may still grow, where nothing tells who has it open."""
    if time.time() - path.stat().st_mtime > _SETTLED_S:
        return False
    return all(record.WhichOneof("record_type") != "exit" for record in read_records(path))


def _is_open(path: Path) -> bool:
    """Return whether a process has a file open for writing."""
    wanted = os.path.realpath(path)
    # A process may end meanwhile, or be somebody else's.
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError), os.scandir(process / "fd") as opened:
            for entry in opened:
                with suppress(OSError):
                    if os.readlink(entry.path) == wanted and _is_for_writing(process, entry.name):
                        return True
    return False


def _is_for_writing(process: Path, descriptor: str) -> bool:
    told = (process / "fdinfo" / descriptor).read_text(encoding="ascii")
    flags = told.split("flags:", 1)[1].split(None, 1)[0]
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
