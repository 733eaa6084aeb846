"""Hands the trackers of a run that is over what they lack of its metric log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from dovetail.errors import DovetailError, RunError, build_message
from dovetail.run.tracking.cursor import Cursor, Position
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import FOLLOWERS, RUN, FolderLock
from dovetail.run.tracking.log import LOG_NAME, repair
from dovetail.run.tracking.reading import parse_record
from dovetail.run.tracking.session import FLUSH_S, end_followers
from dovetail.types import Tracker

if TYPE_CHECKING:
    from dovetail.registry import Registry

MakeTracker: TypeAlias = Callable[[], Tracker]

GRACE_S = 5.0
"""Seconds that calls which are under way get when the user interrupts."""

_POLL_S = 0.5

_TAKING = frozenset(
    {
        "log",
        "log_many",
        "log_params",
        "log_figure",
        "log_text",
        "log_histogram",
        "log_graph",
        "log_artifact",
    }
)
"""What a tracker is given records by."""


@dataclass(frozen=True)
class SyncResult:
    """What became of one tracker."""

    num_records: int = 0
    """Records that it was given; some of them it may have had."""
    had_everything: bool = False
    """Whether it lacked nothing, so that it was not even made."""
    parked_by: str | None = None
    """Why it still lacks records; `None` if it has everything."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Files that it does not take while it takes the rest, and why."""


def sync_run(
    directory: Path,
    names: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    registry: Registry | None = None,
) -> dict[str, SyncResult]:
    """Hand the trackers of a run what they lack.

    Nothing of the run is imported but its trackers and the wrappers of `run.plugins`.

    Args:
        directory: The run's folder.
        names: Trackers in place of those of the run's config; they need not be among them.
        overrides: Settings such as `log.wandb.mode=online`. A tracker whose own options they
            change is another store's: it is given the whole log, if it can tell what it has
            already or can drop it.
        registry: Where trackers come from; the process's own without it.

    Returns:
        What became of each tracker, by name.

    Raises:
        ConfigError: No tracker is named, or a setting does not fit.
        PluginError: A tracker is unknown or broken.
        RunError: There is no metric log, it cannot be written, or another process is at it.
    """
    from dovetail.run.tracking.sync_plan import plan_sync

    plan = plan_sync(directory, names, overrides, registry)
    return sync_trackers(
        directory,
        plan.makers,
        again=plan.changed,
        patience_s=plan.flush_s,
        calls_per_s=plan.calls_per_s,
    )


def sync_trackers(
    directory: Path,
    makers: Mapping[str, MakeTracker],
    *,
    again: Collection[str] = (),
    patience_s: float = FLUSH_S,
    calls_per_s: float | None = None,
) -> dict[str, SyncResult]:
    """Hand trackers what they lack of a metric log, all at once and however long it takes.

    A tracker that raises is tried a few times and then left; the others get theirs.

    Args:
        directory: The run's folder.
        makers: What makes each tracker, by name; not called for one that has everything.
        again: Trackers that get the whole log, if they can tell what they have or can drop it.
        patience_s: How long a crashed run's followers may still take to finish, seconds.
        calls_per_s: Calls per second that a tracker gets at most.

    Returns:
        What became of each tracker, by name.

    Raises:
        RunError: There is no metric log, it cannot be written, or another process is at it.
        KeyboardInterrupt: The user interrupts; what was given is kept.
    """
    path = directory / LOG_NAME
    if not path.is_file():
        found = f"holds no {LOG_NAME}"
        where = f"run folder {str(directory)!r}"
        raise RunError(build_message(where, found, "the folder of a run that has begun"))
    with _hold_run(directory, patience_s):
        repair(path)
        status = read_status(path)
        syncs = [
            _TrackerSync(name, make, path, is_again=name in again, calls_per_s=calls_per_s)
            for name, make in makers.items()
        ]
        try:
            for sync in syncs:
                sync.start(status)
            for sync in syncs:
                while not sync.wait(_POLL_S):  # an endless wait hears no Ctrl-C on Windows
                    pass
        except KeyboardInterrupt:
            for sync in syncs:
                sync.give_up()
            for sync in syncs:
                sync.wait(GRACE_S)
            raise
    return {sync.name: sync.result() for sync in syncs}


def read_status(path: Path) -> str:
    """Return how a run ended, in a tracker's words; a run that never said so has failed."""
    status = "failed"
    with path.open("rb") as file:
        for line in file:
            record = parse_record(line) or {}
            if record.get("kind") == "end":
                status = str(record.get("status"))
            elif record.get("kind") == "params":  # it went on, and has yet to end
                status = "failed"
    return "completed" if status == "stopped early" else status


@contextmanager
def _hold_run(directory: Path, patience_s: float) -> Iterator[None]:
    """Keep everybody else from the log and from its trackers."""
    run, followers = FolderLock(directory, RUN), FolderLock(directory, FOLLOWERS)
    try:
        try:
            run.acquire()
            end_followers(directory, patience_s)
            followers.acquire()
        except OSError as err:
            where, found = f"run folder {str(directory)!r}", f"cannot be written: {err.strerror}"
            hint = "Sync a copy of it that can be."
            raise RunError(build_message(where, found, action=hint)) from err
        yield
    finally:
        followers.release()
        run.release()


class _TrackerSync:
    """One tracker and the follower that feeds it."""

    def __init__(
        self,
        name: str,
        make: MakeTracker,
        path: Path,
        *,
        is_again: bool,
        calls_per_s: float | None,
    ) -> None:
        self.name = name
        self._make = make
        self._path = path
        self._is_again = is_again
        self._calls_per_s = calls_per_s
        self._had_everything = False
        self._error: str | None = None
        self._refused: dict[str, str] = {}
        self._tracker: _CountingTracker | None = None
        self._follower: Follower | None = None

    def start(self, status: str) -> None:
        """Make the tracker and begin to feed it, unless it has everything."""
        cursor = Cursor(self._path.parent, self.name)
        self._had_everything = not self._is_again and _has_everything(cursor, self._path)
        if self._had_everything:
            return
        try:
            tracker = self._make()
        except KeyboardInterrupt:
            raise
        except BaseException as err:  # as from one that calls sys.exit
            is_ours = isinstance(err, DovetailError)
            self._error = str(err) if is_ours else f"{type(err).__name__}: {err}"
            return
        if self._is_again and (hasattr(tracker, "rewind") or _is_idempotent(tracker)):
            cursor.write(Position())  # as after a crash that leaves everything open
        self._tracker = _CountingTracker(tracker)
        self._follower = Follower(
            self.name,
            cast("Tracker", self._tracker),
            self._path,
            calls_per_s=self._calls_per_s,
            on_refused=self._refused.__setitem__,
        )
        self._follower.end(status)  # before it begins, so that it gives up what does not work
        self._follower.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds; return whether it is over, well or not."""
        return self._follower is None or self._follower.join(timeout_s)

    def give_up(self) -> None:
        """Stop after the call that is under way."""
        if self._follower is not None:
            self._follower.give_up("interrupted")

    def result(self) -> SyncResult:
        """Return what became of it."""
        parked_by = self._error if self._follower is None else self._follower.parked_by
        num_records = 0 if self._tracker is None else self._tracker.num_records
        return SyncResult(num_records, self._had_everything, parked_by, self._refused)


class _CountingTracker:
    """Hands everything on to a tracker, and counts the records that it takes."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.num_records = 0

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._tracker, name)
        return partial(self._take, name, member) if name in _TAKING else member

    def _take(self, name: str, method: Callable[..., None], *record: Any) -> None:
        method(*record)
        self.num_records += len(record[0]) if name == "log_many" else 1


def _is_idempotent(tracker: Tracker) -> bool:
    return bool(getattr(tracker, "is_idempotent", False))


def _has_everything(cursor: Cursor, path: Path) -> bool:
    position, size_bytes = cursor.read(), path.stat().st_size
    return not size_bytes or (position.is_clean and position.offset == size_bytes)
