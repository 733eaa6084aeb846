from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dovetail.run.tracking import MetricLog, read_records
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.session import Tracking


def step_record(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": metrics or {"train/loss": float(step)}}


def write_steps(log: MetricLog, steps: range, **metrics: float) -> None:
    for step in steps:
        log.write(step_record(step, **metrics))


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricLog]:
    made = MetricLog(tmp_path)
    yield made
    made.close()


class Recorder:
    """A tracker that keeps what it is given, and raises what it is told to before it keeps it."""

    capabilities: frozenset[Any] = frozenset()

    def __init__(self, fault: Callable[[int], BaseException | None] = lambda call: None) -> None:
        self.fault = fault
        self.num_calls = 0
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.params: Mapping[str, Any] | None = None
        self.status: str | None = None
        self.heard = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.num_calls += 1
        error = self.fault(self.num_calls)
        if error is not None:
            raise error
        self.rows.append((step, dict(metrics)))
        self.heard.set()

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def log_figure(self, name: str, path: Path, step: int) -> None: ...

    def log_artifact(self, name: str, path: Path) -> None: ...

    def close(self, status: str) -> None:
        self.status = status


class QuickFollower(Follower):
    """Follows without long pauses, so that a test of retries is short."""

    NUM_TRIES = 2


def follow(log: MetricLog, tracker: Any, **arguments: Any) -> Follower:
    follower = QuickFollower("mine", tracker, log.path, {"a.b": 1}, poll_s=0.01, **arguments)
    follower.start()
    return follower


# --- followers


def test_a_follower_hands_over_everything_in_order_and_once(log: MetricLog) -> None:
    tracker = Recorder()
    log.write(step_record(0))
    follower = follow(log, tracker)
    assert tracker.heard.wait(10)
    for step in range(1, 200):
        log.write(step_record(step))
    log.write({"kind": "skip", "step": 3, "loss": 1.0})
    follower.finish("completed", 10)
    assert tracker.rows == [(step, {"train/loss": float(step)}) for step in range(200)]
    assert tracker.params == {"a.b": 1}
    assert tracker.status == "completed"
    assert follower.parked_by is None


def test_a_follower_gives_numbers_where_the_log_has_words(log: MetricLog) -> None:
    tracker = Recorder()
    follower = follow(log, tracker)
    with pytest.warns(UserWarning, match="is inf for the first time"):
        log.write(step_record(0, a=math.inf))
    follower.finish("completed", 10)
    assert tracker.rows == [(0, {"a": math.inf})]


def test_a_tracker_that_raises_now_and_then_still_gets_each_record_once(log: MetricLog) -> None:
    tracker = Recorder(lambda call: OSError("network") if call % 3 == 1 else None)
    follower = follow(log, tracker)
    for step in range(6):
        log.write(step_record(step))
    follower.finish("completed", 10)
    assert [step for step, _ in tracker.rows] == list(range(6))
    assert tracker.num_calls == 9
    assert tracker.status == "completed"


@pytest.mark.parametrize("error", [OSError("network"), SystemExit(3), KeyError("x")])
def test_a_tracker_that_always_raises_is_parked_with_one_warning(
    log: MetricLog, error: BaseException
) -> None:
    tracker = Recorder(lambda call: error)

    def run() -> None:
        follower = follow(log, tracker)
        write_steps(log, range(5))
        follower.finish("completed", 10)

    with pytest.warns(UserWarning, match="is parked") as caught:
        run()
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"tracker 'mine': is parked: {type(error).__name__}: ")
    assert message.endswith("The run goes on; every record stands in metrics.jsonl.")
    assert tracker.num_calls == QuickFollower.NUM_TRIES
    assert tracker.rows == []
    assert steps_of(log.path) == list(range(5))


@pytest.mark.parametrize("method", ["log_params", "close"])
def test_a_tracker_may_fail_at_its_beginning_and_at_its_end(
    log: MetricLog, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recorder()
    monkeypatch.setattr(tracker, method, lambda value: 1 / 0)
    log.write(step_record(0))
    with pytest.warns(UserWarning, match="is parked: ZeroDivisionError"):
        follow(log, tracker).finish("completed", 10)
    assert len(tracker.rows) == (method == "close")


def test_a_tracker_that_hangs_ends_with_its_time(log: MetricLog) -> None:
    release = threading.Event()

    class Hanging(Recorder):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            self.heard.set()
            release.wait()

    tracker = Hanging()
    follower = follow(log, tracker)
    log.write(step_record(0))
    assert tracker.heard.wait(10)
    with pytest.warns(UserWarning, match=r"is parked: did not finish within 0.01 s") as caught:
        follower.finish("completed", 0.01)
    release.set()
    follower._thread.join(10)
    assert len(caught) == 1
    assert tracker.status is None


def test_a_log_that_is_taken_away_parks_the_follower(log: MetricLog) -> None:
    tracker = Recorder()
    log.write(step_record(0))

    def take_away() -> None:
        follower = follow(log, tracker)
        assert tracker.heard.wait(10)
        log.path.rename(log.path.with_name("moved"))
        follower.finish("completed", 10)

    with pytest.warns(UserWarning, match="is parked: FileNotFoundError"):
        take_away()


def test_a_follower_passes_over_a_damaged_line(log: MetricLog) -> None:
    log.write(step_record(0))
    with log.path.open("ab") as file:
        file.write(b"\x00\x00\n")
    log.write(step_record(1))
    tracker = Recorder()
    follow(log, tracker).finish("completed", 10)
    assert [step for step, _ in tracker.rows] == [0, 1]


def test_a_follower_goes_on_where_it_had_come_to(log: MetricLog) -> None:
    for step in range(3):
        log.write(step_record(step))
    follow(log, Recorder()).finish("interrupted", 10)
    for step in range(3, 5):
        log.write(step_record(step))
    tracker = Recorder()
    follow(log, tracker).finish("completed", 10)
    assert [step for step, _ in tracker.rows] == [3, 4]


@pytest.mark.parametrize("damage", ["", "x", "-", "999999"])
def test_a_damaged_cursor_stops_nothing(log: MetricLog, damage: str) -> None:
    log.write(step_record(0))
    (log.path.parent / ".mine.cursor").write_text(damage)
    tracker = Recorder()
    follower = follow(log, tracker)
    log.write(step_record(1))
    follower.finish("completed", 10)
    assert tracker.rows[-1][0] == 1


def test_a_resumed_run_lets_a_tracker_drop_what_comes_again(log: MetricLog) -> None:
    class Rewinding(Recorder):
        rewound_to: int | None = None

        def rewind(self, step: int) -> None:
            self.rewound_to = step

    untouched = Rewinding()
    for step in (6, 7, 7):  # the last step has a record of its evaluation too
        log.write(step_record(step))
    follow(log, untouched).finish("interrupted", 10)
    assert untouched.rewound_to is None
    tracker = Rewinding()
    follow(log, tracker, is_resumed=True).finish("completed", 10)
    # All that the log kept was taken; only what the tracker took beyond it has to go.
    assert tracker.rewound_to == 7
    assert tracker.rows == []
    log.write(step_record(8))
    lagging = Rewinding()
    follow(log, lagging, is_resumed=True).finish("completed", 10)
    # Here it may have taken more than the cursor tells of: the last step is given again.
    assert lagging.rewound_to == 6
    assert [step for step, _ in lagging.rows] == [7, 7, 8]


def test_a_tracker_that_took_more_than_its_cursor_tells_of_has_all_once(log: MetricLog) -> None:
    class Store(Recorder):
        def rewind(self, step: int) -> None:
            self.rows = [row for row in self.rows if row[0] <= step]

    for step in range(1, 11):
        log.write(step_record(step))
    store = Store()
    follow(log, store).finish("interrupted", 10)
    cursor = log.path.parent / ".mine.cursor"
    early = cursor.read_text()
    for step in range(11, 16):
        log.write(step_record(step))
    follow(log, store).finish("interrupted", 10)
    # As after a kill: the tracker took 15 records, the cursor tells of 10, the checkpoint of 13.
    cursor.write_text(early)
    log.rewind(sum(map(len, log.path.read_bytes().splitlines(keepends=True)[:13])))
    log.write(step_record(14))
    follow(log, store, is_resumed=True).finish("completed", 10)
    assert [step for step, _ in store.rows] == list(range(1, 15))


def test_a_tracker_without_a_cursor_is_given_everything_again(log: MetricLog) -> None:
    class Rewinding(Recorder):
        rewound_to: int | None = None

        def rewind(self, step: int) -> None:
            self.rewound_to = step

    for step in (1, 2):
        log.write(step_record(step))
    tracker = Rewinding()
    follow(log, tracker, is_resumed=True).finish("completed", 10)
    assert tracker.rewound_to == -1
    assert [step for step, _ in tracker.rows] == [1, 2]


# --- both together


def kinds_of(directory: Path) -> list[tuple[str, str | None]]:
    return [(r["kind"], r.get("status")) for r in read_records(directory)]


def test_tracking_opens_and_closes_log_and_trackers_together(tmp_path: Path) -> None:
    trackers = {"one": Recorder(), "two": Recorder()}
    with Tracking(tmp_path, trackers, {}) as tracking:
        tracking.log.write(step_record(0))
        tracking.status = "completed"
    assert kinds_of(tmp_path) == [("step", None), ("end", "completed")]
    assert [t.status for t in trackers.values()] == ["completed", "completed"]
    assert [len(t.rows) for t in trackers.values()] == [1, 1]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("odd"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_tracking_records_how_a_run_broke(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    tracker = Recorder()
    with pytest.raises(type(error)), Tracking(tmp_path, {"one": tracker}, {}):
        raise error
    (record,) = read_records(tmp_path)
    assert record["status"] == status
    assert record["error"] == f"{type(error).__name__}: {error}"
    assert tracker.status == status


def test_tracking_of_a_resumed_run_drops_what_comes_again(tmp_path: Path) -> None:
    with Tracking(tmp_path, {}, {}) as tracking:
        tracking.log.write(step_record(1))
        size = tracking.log.tell()
        tracking.log.write(step_record(2))
    with Tracking(tmp_path, {}, {}, resumed_at=(1, size)) as tracking:
        tracking.log.write(step_record(5))
        tracking.status = "completed"
    assert kinds_of(tmp_path) == [("step", None), ("step", None), ("end", "completed")]
    assert steps_of_steps(tmp_path) == [1, 5]


def steps_of_steps(directory: Path) -> list[int]:
    return [r["step"] for r in read_records(directory) if r["kind"] == "step"]


def test_trackers_that_hang_share_the_time_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    class Hanging(Recorder):
        def close(self, status: str) -> None:
            release.wait()

    monkeypatch.setattr(Tracking, "FLUSH_S", 0.05)
    quick = Recorder()
    trackers = {"a": Hanging(), "b": Hanging(), "c": quick}
    before = threading.active_count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracking(tmp_path, trackers, {}) as tracking:
            tracking.log.write(step_record(0))
    assert sorted(str(w.message)[:11] for w in caught)[:2] == ["tracker 'a'", "tracker 'b'"]
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("dovetail-"):
            thread.join(10)
    assert threading.active_count() <= before
