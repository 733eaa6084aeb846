from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import RunError
from dovetail.run.tracking import MetricLog, read_records
from dovetail.run.tracking.cursor import Cursor, Position
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import FOLLOWERS, FolderLock, is_locked
from dovetail.run.tracking.session import Tracking, end_followers, open_log

pytestmark = pytest.mark.usefixtures("quick_pauses")


def step_record(step: int) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": {"train/loss": float(step)}}


def kinds_of(directory: Path) -> list[tuple[str, str | None]]:
    return [(r["kind"], r.get("status")) for r in read_records(directory)]


def steps_of(directory: Path) -> list[int]:
    return [r["step"] for r in read_records(directory) if r["kind"] == "step"]


def raise_odd(method: str, number: int) -> None:
    raise ValueError("odd")


class Elsewhere:
    """Followers elsewhere, which note what they are told and how long the log was then."""

    def __init__(self, directory: Path, parked: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.parked = parked or {}
        self.told: list[tuple[Any, ...]] = []
        self.timeout_s = -1.0

    def start(self) -> None:
        self.told.append(("start", kinds_of(self.directory)))

    def end(self, status: str) -> None:
        self.told.append(("end", status, kinds_of(self.directory)))

    def join(self, timeout_s: float) -> dict[str, str]:
        self.timeout_s = timeout_s
        return self.parked


# --- the log


def test_tracking_writes_the_settings_first_and_the_end_last(tmp_path: Path, recorder: Any) -> None:
    trackers = {"one": recorder(), "two": recorder()}
    with Tracking(open_log(tmp_path), trackers, {"a.b": 1}) as tracking:
        tracking.log.write(step_record(0))
        tracking.status = "completed"
    assert kinds_of(tmp_path) == [("params", None), ("step", None), ("end", "completed")]
    first, *_, last = read_records(tmp_path)
    assert first["params"] == {"a.b": 1}
    assert "error" not in last
    calls = [("log_params", {"a.b": 1}), ("log", 0, {"train/loss": 0.0}), ("close", "completed")]
    assert [tracker.calls for tracker in trackers.values()] == [calls, calls]
    assert tracking.parked == {}
    assert not is_locked(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("odd"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_tracking_records_how_a_run_broke(
    tmp_path: Path, recorder: Any, error: BaseException, status: str
) -> None:
    tracker = recorder()
    with pytest.raises(type(error)), Tracking(open_log(tmp_path), {"one": tracker}, {}):
        raise error
    *_, record = read_records(tmp_path)
    assert (record["kind"], record["status"]) == ("end", status)
    assert record["error"] == f"{type(error).__name__}: {error}"
    assert tracker.status == status


@pytest.mark.parametrize(
    ("status", "told"),
    [("completed", "completed"), ("stopped early", "completed"), ("interrupted", "interrupted")],
)
def test_trackers_hear_of_the_end_in_their_own_words(
    tmp_path: Path, recorder: Any, status: str, told: str
) -> None:
    tracker, elsewhere = recorder(), Elsewhere(tmp_path)
    with Tracking(open_log(tmp_path), {"one": tracker}, {}, elsewhere) as tracking:
        tracking.status = status
    assert kinds_of(tmp_path)[-1] == ("end", status)
    assert tracker.status == told
    assert elsewhere.told[-1][:2] == ("end", told)


def test_tracking_that_nobody_completes_has_failed(tmp_path: Path, recorder: Any) -> None:
    tracker = recorder()
    with Tracking(open_log(tmp_path), {"one": tracker}, {}):
        pass
    assert kinds_of(tmp_path)[-1] == ("end", "failed")
    assert tracker.status == "failed"


def test_files_of_the_run_are_referred_to_from_its_folder(tmp_path: Path, recorder: Any) -> None:
    tracker = recorder(capabilities=["figures"])
    (tmp_path / "media").mkdir()
    with Tracking(open_log(tmp_path), {"one": tracker}, {}) as tracking:
        tracking.add_file("figure", "confusion", tmp_path / "media" / "a.png", 7)
    (record,) = [r for r in read_records(tmp_path) if r["kind"] == "figure"]
    assert (record["name"], record["file"], record["step"]) == ("confusion", "media/a.png", 7)
    assert ("log_figure", "confusion", tmp_path / "media" / "a.png", 7) in tracker.calls


# --- followers elsewhere


def test_followers_elsewhere_are_told_when_their_records_are_there(tmp_path: Path) -> None:
    elsewhere = Elsewhere(tmp_path, {"far": "too far"})
    with Tracking(open_log(tmp_path), {}, {}, elsewhere, flush_s=7.0) as tracking:
        tracking.log.write(step_record(0))
        tracking.status = "completed"
    begin, whole = [("params", None)], [("params", None), ("step", None), ("end", "completed")]
    assert elsewhere.told == [("start", begin), ("end", "completed", whole)]
    assert 0 < elsewhere.timeout_s <= 7.0
    assert tracking.parked == {"far": "too far"}


def test_log_is_closed_where_the_user_does_not_wait_for_followers(tmp_path: Path) -> None:
    class Impatient(Elsewhere):
        def join(self, timeout_s: float) -> dict[str, str]:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        Tracking(open_log(tmp_path), {}, {}, Impatient(tmp_path)),
    ):
        pass
    MetricLog(tmp_path).close()


# --- trackers that are late, or raise


def test_trackers_that_hang_share_the_time_there_is(
    tmp_path: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    timeouts_s: list[float] = []
    join = Follower.join

    def note_and_join(follower: Follower, timeout_s: float) -> bool:
        timeouts_s.append(timeout_s)
        return join(follower, timeout_s)

    monkeypatch.setattr(Follower, "join", note_and_join)

    def hang(method: str, number: int) -> None:
        if method == "close":
            release.wait()

    has_row = threading.Event()
    quick = recorder(lambda method, number: method == "log" and has_row.set())
    elsewhere = Elsewhere(tmp_path)
    trackers = {"a": recorder(hang), "b": recorder(hang), "c": quick}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracking(open_log(tmp_path), trackers, {}, elsewhere, flush_s=0.2) as tracking:
            tracking.log.write(step_record(0))
            assert has_row.wait(10)
    texts = [str(w.message) for w in caught]
    assert [text.partition(":")[0] for text in texts[:2]] == ["tracker 'a'", "tracker 'b'"]
    assert set(list(tracking.parked)[:2]) == {"a", "b"}
    assert tracking.parked["a"] == "did not finish within 0.2 s (log.flush_s)"
    assert 0.1 < timeouts_s[0] <= 0.2
    assert [*timeouts_s[1:], elsewhere.timeout_s] == [0.0, 0.0, 0.0]
    release.set()
    for thread in threading.enumerate():
        if thread.name in ("dovetail-a", "dovetail-b", "dovetail-c"):
            thread.join(10)
            assert not thread.is_alive()
    assert quick.steps == [0]
    assert not is_locked(tmp_path)


def test_a_tracker_that_raises_is_parked_with_one_warning(tmp_path: Path, recorder: Any) -> None:
    bad, good = recorder(raise_odd), recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracking(open_log(tmp_path), {"bad": bad, "good": good}, {}) as tracking:
            for step in range(3):
                tracking.log.write(step_record(step))
    (warning,) = caught
    assert str(warning.message) == (
        "tracker 'bad': is parked: ValueError: odd. The run goes on; every record stands in "
        "metrics.jsonl, and what the tracker lacks in the end it gets by: "
        f"dovetail log sync {tmp_path}"
    )
    assert tracking.parked == {"bad": "ValueError: odd"}
    assert good.steps == steps_of(tmp_path) == [0, 1, 2]


def test_a_file_that_is_refused_is_warned_of(tmp_path: Path, recorder: Any) -> None:
    def refuse(method: str, number: int) -> None:
        if method == "log_artifact":
            raise ValueError("too large")

    tracker = recorder(refuse, ["artifacts"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracking(open_log(tmp_path), {"mine": tracker}, {}) as tracking:
            tracking.add_file("artifact", "bundle", tmp_path / "bundle", 3)
    (warning,) = caught
    assert str(warning.message) == "tracker 'mine': does not take bundle: ValueError: too large."
    assert tracking.parked == {}
    assert tracker.status == "failed"


def test_calls_per_s_reaches_the_followers(tmp_path: Path, recorder: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = recorder()
        with Tracking(
            open_log(tmp_path), {"mine": tracker}, {}, flush_s=0.01, calls_per_s=0.001
        ) as tracking:
            assert tracker.heard.wait(10)
            tracking.log.write(step_record(0))
    assert len(caught) == 1
    assert tracker.methods == ["log_params"]


# --- resuming


def test_a_resumed_run_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    with Tracking(open_log(tmp_path), {}, {}) as tracking:
        tracking.log.write(step_record(1))
        size_bytes = tracking.log.tell()
        tracking.log.write(step_record(2))
    with Tracking(open_log(tmp_path, (1, size_bytes)), {}, {}) as tracking:
        tracking.log.write(step_record(5))
        tracking.status = "completed"
    kinds = [kind for kind, _ in kinds_of(tmp_path)]
    assert kinds == ["params", "step", "params", "step", "end"]
    assert steps_of(tmp_path) == [1, 5]


def test_open_log_takes_the_cursors_back_with_the_log(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(step_record(1))
    size_bytes = log.tell()
    log.write(step_record(2))
    for name, position in (("before", Position(5)), ("behind", Position(log.tell(), True))):
        Cursor(tmp_path, name).write(position)
    log.close()
    open_log(tmp_path).close()
    assert Cursor(tmp_path, "before").read() == Position(5)
    log = open_log(tmp_path, (1, size_bytes))
    assert log.tell() == size_bytes
    assert Cursor(tmp_path, "before").read() == Position(5, needs_rewind=True)
    assert Cursor(tmp_path, "behind").read() == Position(size_bytes, needs_rewind=True)
    log.close()


def test_a_tracker_of_a_resumed_run_holds_what_the_log_holds(tmp_path: Path, recorder: Any) -> None:
    rewound_to: list[int] = []
    tracker = recorder()

    def rewind(step: int) -> None:
        rewound_to.append(step)
        tracker.calls = [call for call in tracker.calls if call[0] == "log" and call[1] <= step]

    tracker.rewind = rewind
    with Tracking(open_log(tmp_path), {"mine": tracker}, {}) as tracking:
        for step in (1, 2, 3, 4):
            tracking.log.write(step_record(step))
            if step == 2:
                size_bytes = tracking.log.tell()
    with Tracking(open_log(tmp_path, (2, size_bytes)), {"mine": tracker}, {}) as tracking:
        for step in (3, 4, 5):
            tracking.log.write(step_record(step))
    assert rewound_to == [1]
    assert tracker.steps == steps_of(tmp_path) == [1, 2, 3, 4, 5]


# --- followers that a crashed run has left

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX ones")


@needs_locks
def test_followers_of_a_crashed_run_may_finish(
    tmp_path: Path, other_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(lock: FolderLock) -> bool:
        # They end when it has been looked at the lock a few times.
        looks.append(take(lock))
        if len(looks) == 3:
            process.stdin.close()
        return looks[-1]

    looks: list[bool] = []
    take = FolderLock._take
    with other_process(tmp_path, FOLLOWERS) as process:
        assert process.stdin is not None
        monkeypatch.setattr(FolderLock, "_take", finish)
        end_followers(tmp_path, patience_s=60)
        assert process.wait(10) == 0
        assert not any(looks[:3])
    assert not is_locked(tmp_path, FOLLOWERS)


@needs_locks
def test_followers_of_a_crashed_run_that_do_not_finish_are_ended(
    tmp_path: Path, other_process: Any
) -> None:
    with other_process(tmp_path, FOLLOWERS) as process:
        log = open_log(tmp_path, patience_s=0.05)
        assert process.wait(10) == -signal.SIGKILL
        log.close()
    assert not is_locked(tmp_path, FOLLOWERS)


@needs_locks
def test_followers_are_left_in_peace_by_whoever_cannot_have_the_run(
    tmp_path: Path, other_process: Any
) -> None:
    with other_process(tmp_path, FOLLOWERS) as process:
        log = MetricLog(tmp_path)
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
            open_log(tmp_path, patience_s=0)
        assert process.poll() is None
        log.close()


def test_end_followers_leaves_the_lock_free(tmp_path: Path) -> None:
    end_followers(tmp_path, 0)
    assert not is_locked(tmp_path, FOLLOWERS)
