"""How runs went: what a list of them shows, read from their folders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.run.lookup import find_runs
from dovetail.run.scan import Scan, scan_log
from dovetail.run.settings import find_monitor, parse_settings, read_config_text
from dovetail.run.tracking.lock import RUN, FolderLock, is_locked
from dovetail.run.tracking.log import LOG_NAME
from dovetail.run.tracking.reading import parse_record

RUNNING = "running"
CRASHED = "crashed"
EMPTY = "empty"
FAILED = "failed"
STATUSES = (RUNNING, "completed", "stopped early", "interrupted", FAILED, CRASHED, EMPTY)
"""How a run stands; "crashed" is one that is gone without a word, "empty" one without a record."""

SILENCE_S = 120.0
"""Where no lock tells whether a process is there, a log that rests this long has none."""


@dataclass(frozen=True)
class RunSummary:
    """A run as a list shows it."""

    run_dir: Path
    name: str
    id: str
    status: str
    num_steps: int = 0
    """Optimizer steps."""
    monitor: str = ""
    """Metric that decides which step is best."""
    monitor_mode: str = "min"
    best_value: float | None = None
    """Best finite value of the monitor."""
    best_step: int | None = None
    best_metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the best value's record."""
    last_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the last step and the last evaluation."""
    started_s: float | None = None
    """Seconds since the epoch of Unix."""
    duration_s: float | None = None
    """Seconds between the first record and the last, without the pauses before a resume."""
    num_resumes: int = 0
    error: str | None = None
    """Why it failed."""


def list_runs(root: Path) -> list[RunSummary]:
    """Return the runs under a folder, the oldest first."""
    runs = [summarize_run(path) for path in find_runs(root)]
    return sorted(runs, key=lambda run: (run.started_s or 0.0, str(run.run_dir)))


def summarize_run(run_dir: Path) -> RunSummary:
    """Return how a run went or goes, from its log and its settings.

    Args:
        run_dir: Its folder. The log may be missing, or be written at this very moment.
    """
    log = run_dir / LOG_NAME
    first = _first_record(log)
    settings = _find_settings(run_dir, first)
    monitor, mode = find_monitor(settings)
    try:
        scan = scan_log(log, monitor, mode)
    except OSError:
        scan = Scan()
    begin, end = scan.first or {}, scan.last or {}
    records = [r for r in (scan.last_step, scan.last_evaluation) if r is not None]
    started_s, ended_s = begin.get("time"), end.get("time")
    duration_s = None
    if isinstance(started_s, (int, float)) and isinstance(ended_s, (int, float)):
        duration_s = max(0.0, ended_s - started_s - scan.paused_s)
    folder = run_dir.resolve()
    return RunSummary(
        run_dir=run_dir,
        name=str(settings.get("run.name", folder.parent.name)),
        id=folder.name,
        status=find_status(run_dir, scan.last),
        num_steps=max((_step_of(record) for record in records), default=0),
        monitor=monitor,
        monitor_mode=mode,
        best_value=scan.best_value,
        best_step=None if scan.best is None else _step_of(scan.best),
        best_metrics={} if scan.best is None else scan.best["metrics"],
        last_metrics={k: v for r in records for k, v in r.get("metrics", {}).items()},
        started_s=started_s,
        duration_s=duration_s,
        num_resumes=scan.num_resumes,
        error=end.get("error"),
    )


def find_status(run_dir: Path, last: Mapping[str, Any] | None) -> str:
    """Return how a run stands.

    Args:
        run_dir: Its folder.
        last: The last record of its log.
    """
    if last is not None and last.get("kind") == "end":
        return str(last.get("status", "completed"))
    if is_alive(run_dir):
        return RUNNING
    return EMPTY if last is None else CRASHED


def is_alive(run_dir: Path) -> bool:
    """Return whether a process seems to be writing a run's log.

    The lock of the folder tells; where there is none, or the platform has no locks, a log that
    changed within `SILENCE_S` seconds does.
    """
    if is_locked(run_dir):
        return True
    if has_lock(run_dir):
        return False
    try:
        changed_s = (run_dir / LOG_NAME).stat().st_mtime
    except OSError:
        return False
    return time.time() - changed_s < SILENCE_S


def has_lock(run_dir: Path) -> bool:
    """Return whether the lock of a run's folder tells if its process is there."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows
        return False
    return FolderLock(run_dir, RUN).path.exists()


def _first_record(log: Path) -> dict[str, Any] | None:
    try:
        with log.open("rb") as file:
            return parse_record(file.readline())
    except OSError:
        return None


def _find_settings(run_dir: Path, first: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a run's settings: those at the head of the log are read faster than the config."""
    if first is not None and isinstance(first.get("params"), dict):
        params: dict[str, Any] = first["params"]
        return params
    return parse_settings(read_config_text(run_dir))


def _step_of(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0
