"""Follows a metric log that another process writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.reading import parse_record


class LogTail:
    """Reads what is new in a run's log each time it is asked.

    Args:
        run_dir: The run's folder; its log may not be there yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOG_NAME
        self._offset = 0
        self._last_line = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the new records, and whether they begin anew as a resume cut the log back."""
        try:
            with self._path.open("rb") as file:
                is_anew = not self._is_where_it_was(file)
                if is_anew:
                    self._offset, self._last_line = 0, b""
                file.seek(self._offset)
                data = file.read()
        except OSError:  # not there yet, or no longer
            return [], False
        # A line that is still being written waits for the next time.
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        lines = data.splitlines(keepends=True)
        if lines:
            self._last_line = lines[-1]
        records = [parse_record(line) for line in lines]
        return [record for record in records if record is not None], is_anew

    def _is_where_it_was(self, file: Any) -> bool:
        """Return whether the last line that was read still ends where it ended."""
        file.seek(self._offset - len(self._last_line))
        return bool(file.read(len(self._last_line)) == self._last_line)
