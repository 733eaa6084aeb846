"""How far each tracker has come in the metric log, kept where a crash does not reach it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SUFFIX = ".cursor"


@dataclass(frozen=True)
class Position:
    """Where a tracker stands in the log."""

    offset: int = 0
    """Bytes of the log that it has taken, at least."""
    is_clean: bool = False
    """Whether it was closed in order: it took nothing behind `offset`."""
    needs_rewind: bool = False
    """Whether the log was cut there since: what it took behind `offset` is no longer true."""


class Cursor:
    """The position of one tracker, in a file beside the log.

    Args:
        directory: The run's folder.
        name: The tracker's name.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / f".{name.replace(':', '-')}{_SUFFIX}"

    def exists(self) -> bool:
        """Return whether the tracker was ever fed."""
        return self._path.exists()

    def read(self) -> Position:
        """Return the position; that of a damaged or missing file is the beginning."""
        return _read(self._path)

    def write(self, position: Position) -> None:
        """Keep a position; on a full disk the old one stays, which costs a record given twice."""
        _write(self._path, position)


def list_cursors(directory: Path) -> list[str]:
    """Return the names of all trackers that were ever fed from a run."""
    return sorted(p.name[1 : -len(_SUFFIX)] for p in directory.glob(f".*{_SUFFIX}"))


def rewind_cursors(directory: Path, size_bytes: int) -> None:
    """Note for every tracker of a run that its log was cut to `size_bytes`."""
    for path in directory.glob(f".*{_SUFFIX}"):
        position = _read(path)
        offset = min(position.offset, size_bytes)
        is_clean = position.is_clean and offset == position.offset
        if not is_clean:
            _write(path, Position(offset, needs_rewind=True))


def _read(path: Path) -> Position:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        fields: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        offset = fields.get("offset", 0)
        if isinstance(offset, int) and offset >= 0:
            return Position(**fields)
    return Position()


def _write(path: Path, position: Position) -> None:
    with suppress(OSError):
        beside = path.with_name(f"{path.name}.partial")
        beside.write_text(json.dumps(asdict(position)), encoding="ascii")
        beside.replace(path)
