from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.run.tracking import MetricLog, read_records
from dovetail.run.tracking.cursor import Cursor, Position
from dovetail.run.tracking.follower import Follower, last_steps_before

pytestmark = pytest.mark.usefixtures("quick_pauses")

Rows = list[tuple[int, dict[str, float]]]


def step_record(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "metrics": metrics or {"train/loss": float(step)}}


def file_record(name: str) -> dict[str, Any]:
    return {"kind": "artifact", "name": name, "file": f"{name}.bin"}


def write_steps(log: MetricLog, steps: Any) -> None:
    for step in steps:
        log.write(step_record(step))


def make_follower(log: MetricLog, tracker: Any, **arguments: Any) -> Follower:
    return Follower("mine", tracker, log.path, poll_s=0.01, **arguments)


def follow(log: MetricLog, tracker: Any, status: str = "completed", **arguments: Any) -> Follower:
    """Follow a log that is complete to its end."""
    follower = make_follower(log, tracker, **arguments)
    follower.end(status)
    follower.start()
    assert follower.join(30)
    return follower


def cursor_of(log: MetricLog) -> Position:
    return Cursor(log.path.parent, "mine").read()


def place_behind(log: MetricLog, num_records: int) -> int:
    """Return the length of the first records of a log, bytes."""
    return sum(map(len, log.path.read_bytes().splitlines(keepends=True)[:num_records]))


def raising(error: BaseException, is_bad: Callable[[str, int], bool]) -> Callable[[str, int], None]:
    """Return a fault that raises an error in some calls."""

    def fault(method: str, number: int) -> None:
        if is_bad(method, number):
            raise error

    return fault


class NotedWaits(threading.Event):
    """An event that does not wait, and notes for how long it should."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        if timeout:
            self.timeouts_s.append(timeout)
        return self.is_set()


# --- in order and once


def test_a_follower_hands_over_everything_in_order_and_once(log: MetricLog, recorder: Any) -> None:
    tracker = recorder()
    log.write({"kind": "params", "params": {"a.b": 1}})
    follower = make_follower(log, tracker)
    follower.start()
    assert tracker.heard.wait(10)
    write_steps(log, range(200))
    log.write({"kind": "skip", "step": 200, "loss": 1.0})
    follower.end("completed")
    assert follower.join(10)
    rows = [("log", step, {"train/loss": float(step)}) for step in range(200)]
    assert tracker.calls == [("log_params", {"a.b": 1}), *rows, ("close", "completed")]
    assert follower.parked_by is None
    assert cursor_of(log) == Position(log.tell(), is_clean=True)


def test_a_follower_sees_what_is_written_while_it_waits(log: MetricLog, recorder: Any) -> None:
    tracker = recorder()
    follower = make_follower(log, tracker)
    follower.start()
    for step in range(3):
        tracker.heard.clear()
        log.write(step_record(step))
        assert tracker.heard.wait(10)
    follower.end("completed")
    assert follower.join(10)
    assert tracker.steps == [0, 1, 2]


def test_a_follower_gives_numbers_where_the_log_has_words(log: MetricLog, recorder: Any) -> None:
    tracker = recorder()
    with pytest.warns(UserWarning, match="is inf for the first time"):
        log.write(step_record(0, a=math.inf))
    follow(log, tracker)
    assert tracker.rows == [(0, {"a": math.inf})]


def test_a_follower_goes_on_where_it_had_come_to(log: MetricLog, recorder: Any) -> None:
    write_steps(log, range(3))
    follow(log, recorder(), "interrupted")
    write_steps(log, range(3, 5))
    tracker = recorder()
    follow(log, tracker)
    assert tracker.steps == [3, 4]


def test_a_follower_passes_over_damaged_lines(log: MetricLog, recorder: Any) -> None:
    log.write(step_record(0))
    with log.path.open("ab") as file:
        file.write(b'\x00\x00\n{"kind":"params"}\n{"kind":"artifact"}\n')
    log.write(step_record(1))
    tracker = recorder(capabilities=["artifacts"])
    assert follow(log, tracker).parked_by is None
    assert tracker.steps == [0, 1]


@pytest.mark.parametrize("damage", ["", "x", "999", "[]", '{"offset": "3"}', '{"offset": -7}'])
def test_a_damaged_cursor_costs_nothing_but_rows_given_twice(
    log: MetricLog, recorder: Any, damage: str
) -> None:
    write_steps(log, range(3))
    (log.path.parent / ".mine.cursor").write_text(damage)
    tracker = recorder()
    assert follow(log, tracker).parked_by is None
    assert tracker.steps == [0, 1, 2]


def test_a_cursor_behind_the_end_of_the_log_is_at_its_end(log: MetricLog, recorder: Any) -> None:
    write_steps(log, range(3))
    Cursor(log.path.parent, "mine").write(Position(10**6, is_clean=True))
    tracker = recorder()
    follow(log, tracker)
    log.write(step_record(3))
    follow(log, tracker)
    assert tracker.steps == [3]


# --- trackers that raise


def test_a_tracker_that_raises_now_and_then_still_gets_each_record_once(
    log: MetricLog, recorder: Any
) -> None:
    tracker = recorder(raising(OSError("network"), lambda method, number: number % 3 == 1))
    write_steps(log, range(6))
    parked: list[str] = []
    follow(log, tracker, on_parked=parked.append)
    assert tracker.steps == list(range(6))
    assert tracker.num_calls == 11
    assert tracker.status == "completed"
    assert parked == []


def test_each_try_waits_longer_than_the_one_before(
    log: MetricLog, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Follower, "PAUSE_S", 0.05)
    tracker = recorder(raising(OSError("network"), lambda method, number: number < 4))
    log.write(step_record(0))
    follower = make_follower(log, tracker)
    follower._is_given_up = waits = NotedWaits()
    follower.end("completed")
    follower.start()
    assert follower.join(10)
    assert waits.timeouts_s == pytest.approx([0.05, 0.2, 0.8])
    assert tracker.steps == [0]


@pytest.mark.parametrize(
    "error", [OSError("network"), KeyError("x"), SystemExit(3), KeyboardInterrupt()]
)
def test_a_tracker_that_always_raises_is_parked_with_one_word(
    log: MetricLog, recorder: Any, error: BaseException
) -> None:
    tracker = recorder(raising(error, lambda method, number: True))
    parked: list[str] = []
    follower = make_follower(log, tracker, on_parked=parked.append)
    write_steps(log, range(5))
    follower.start()
    assert tracker.heard.wait(10)
    follower.end("completed")
    assert follower.join(10)
    assert parked == [f"{type(error).__name__}: {error}"]
    assert follower.parked_by == parked[0]
    assert tracker.calls == []
    assert tracker.num_calls % Follower.NUM_TRIES == 0
    assert cursor_of(log) == Position(0, is_clean=False)
    # The next one has it all.
    after = recorder()
    follow(log, after)
    assert after.steps == list(range(5))


def test_a_parked_tracker_gets_what_it_lacks_when_it_works_again(
    log: MetricLog, recorder: Any
) -> None:
    is_up = threading.Event()
    num_tries = 3 * Follower.NUM_TRIES

    def fault(method: str, number: int) -> None:
        if number > num_tries:
            is_up.set()
        if number > 2 and not is_up.is_set():
            raise OSError("network")

    tracker = recorder(fault)
    parked: list[str] = []
    write_steps(log, range(5))
    follower = make_follower(log, tracker, on_parked=parked.append)
    follower.start()
    assert is_up.wait(10)
    write_steps(log, range(5, 8))
    follower.end("completed")
    assert follower.join(10)
    assert tracker.steps == list(range(8))
    assert tracker.status == "completed"
    assert parked == ["OSError: network"]
    assert follower.parked_by is None


def test_a_tracker_that_is_parked_again_has_been_told_of(log: MetricLog, recorder: Any) -> None:
    # Each record is refused for the tries of one round, and taken in the next one.
    left = dict.fromkeys(range(1, 4), Follower.NUM_TRIES)

    def fault(method: str, number: int) -> None:
        step = len(tracker.steps) + 1
        if left.get(step, 0):
            left[step] -= 1
            raise OSError(f"network of {step}")

    tracker = recorder(fault)
    parked: list[str] = []
    write_steps(log, range(1, 4))
    follower = make_follower(log, tracker, on_parked=parked.append)
    follower._is_complete = complete = NotedWaits()
    complete.wait = lambda timeout=None: complete.is_set()  # type: ignore[method-assign]
    follower.start()
    while len(tracker.steps) < 3:
        assert not follower.join(0.001)
    follower.end("completed")
    assert follower.join(10)
    assert tracker.steps == [1, 2, 3]
    assert parked == ["OSError: network of 1"]


def test_pauses_of_a_parked_tracker_grow_and_begin_anew_when_it_takes_something(
    log: MetricLog, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Follower, "PARKED_S", 30.0)
    monkeypatch.setattr(Follower, "PARKED_MAX_S", 100.0)
    num_tries = Follower.NUM_TRIES
    # Four rounds in vain, a record, another round in vain, and the rest.
    bad = {*range(1, 4 * num_tries + 1), *range(4 * num_tries + 2, 5 * num_tries + 2)}
    tracker = recorder(raising(OSError("network"), lambda method, number: number in bad))
    write_steps(log, range(2))
    follower = make_follower(log, tracker)
    follower._is_complete = waits = NotedWaits()
    follower.start()
    while len(tracker.steps) < 2:
        assert not follower.join(0.001)
    follower.end("completed")
    assert follower.join(10)
    assert [s for s in waits.timeouts_s if s > 1] == [30.0, 60.0, 100.0, 100.0, 30.0]


@pytest.mark.parametrize("method", ["log_params", "log", "close"])
def test_a_tracker_may_fail_at_its_beginning_and_at_its_end(
    log: MetricLog, recorder: Any, method: str
) -> None:
    tracker = recorder(raising(ZeroDivisionError("oh"), lambda name, number: name == method))
    log.write({"kind": "params", "params": {}})
    log.write(step_record(0))
    assert follow(log, tracker).parked_by == "ZeroDivisionError: oh"
    taken = {"log_params": [], "log": ["log_params"], "close": ["log_params", "log"]}[method]
    assert tracker.methods == taken
    assert cursor_of(log) == Position(place_behind(log, len(taken)), is_clean=False)


def test_a_log_that_is_taken_away_parks_the_follower(log: MetricLog, recorder: Any) -> None:
    tracker = recorder()
    log.write(step_record(0))
    parked: list[str] = []
    follower = make_follower(log, tracker, on_parked=parked.append)
    follower.start()
    assert tracker.heard.wait(10)
    log.path.rename(log.path.with_name("moved"))
    assert follower.join(10)
    assert len(parked) == 1
    assert parked[0].startswith("FileNotFoundError: ")
    assert follower.parked_by == parked[0]
    assert tracker.status is None


# --- trackers that hang, and limits


@pytest.mark.parametrize("method", ["log", "close"])
def test_a_tracker_that_hangs_is_given_up(log: MetricLog, recorder: Any, method: str) -> None:
    release, hangs = threading.Event(), threading.Event()

    def fault(name: str, number: int) -> None:
        if name == method:
            hangs.set()
            release.wait()

    tracker = recorder(fault)
    write_steps(log, range(3))
    parked: list[str] = []
    follower = make_follower(log, tracker, on_parked=parked.append)
    follower.start()
    follower.end("completed")
    assert hangs.wait(10)
    assert not follower.join(0)
    follower.give_up("too late")
    assert (parked, follower.parked_by) == (["too late"], "too late")
    release.set()
    assert follower.join(10)
    # The call that was under way counts, and nothing is called after it.
    assert tracker.methods == (["log"] if method == "log" else ["log"] * 3 + ["close"])
    assert cursor_of(log) == Position(place_behind(log, len(tracker.steps)), method == "close")
    assert (parked, follower.parked_by) == (["too late"], "too late")


def test_a_tracker_that_raises_when_it_is_given_up_is_not_tried_again(
    log: MetricLog, recorder: Any
) -> None:
    release = threading.Event()

    def fault(name: str, number: int) -> None:
        release.wait()
        raise OSError("network")

    tracker = recorder(fault)
    log.write(step_record(0))
    parked: list[str] = []
    follower = make_follower(log, tracker, on_parked=parked.append)
    follower.start()
    assert tracker.heard.wait(10)
    follower.give_up("too late")
    release.set()
    assert follower.join(10)
    assert tracker.num_calls == 1
    assert parked == ["too late"]
    assert follower.parked_by == "too late"


def test_the_reason_of_giving_up_is_told_whoever_comes_first(log: MetricLog, recorder: Any) -> None:
    parked: list[str] = []
    tracker = recorder()
    follower = make_follower(log, tracker, calls_per_s=0.001, on_parked=parked.append)

    class SlowToReturn(threading.Event):
        def set(self) -> None:
            super().set()
            assert follower.join(10)

    write_steps(log, range(3))
    follower._is_given_up = SlowToReturn()
    follower.start()
    assert tracker.heard.wait(10)
    follower.give_up("too late")
    assert (parked, follower.parked_by) == (["too late"], "too late")


def test_calls_keep_the_pause_that_a_limit_asks_for(log: MetricLog, recorder: Any) -> None:
    tracker = recorder(raising(OSError("network"), lambda method, number: number == 1))
    write_steps(log, range(3))
    follower = make_follower(log, tracker, calls_per_s=0.01)
    follower._is_given_up = waits = NotedWaits()
    follower.end("completed")
    follower.start()
    assert follower.join(10)
    # A second try is a call too, and so is the last one.
    assert tracker.num_calls == 5
    long = [s for s in waits.timeouts_s if s > 1]
    assert long == pytest.approx([100.0] * 4, abs=20)


def test_a_tracker_that_is_given_up_while_it_waits_for_its_limit_gets_nothing_more(
    log: MetricLog, recorder: Any
) -> None:
    waits = threading.Event()

    class ToldWaits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None and timeout > 1:
                waits.set()
            return super().wait(timeout)

    tracker = recorder()
    write_steps(log, range(3))
    follower = make_follower(log, tracker, calls_per_s=0.001)
    follower._is_given_up = ToldWaits()
    follower.start()
    assert waits.wait(10)
    follower.give_up("too late")
    assert follower.join(10)
    assert tracker.methods == ["log"]


# --- files


def refusing(*names: str) -> Callable[[str, int], None]:
    """Return a fault of some methods."""
    return raising(ValueError("too large"), lambda method, number: method in names)


def test_a_file_that_a_tracker_refuses_is_left_out_with_a_word(
    log: MetricLog, recorder: Any
) -> None:
    tracker = recorder(refusing("log_artifact"), capabilities=["artifacts"])
    for record in (step_record(0), file_record("huge"), file_record("other"), step_record(1)):
        log.write(record)
    refused: list[tuple[str, str]] = []
    parked: list[str] = []
    follow(
        log,
        tracker,
        on_parked=parked.append,
        on_refused=lambda file, reason: refused.append((file, reason)),
    )
    why = "ValueError: too large"
    assert refused == [("huge.bin", why), ("other.bin", why)]
    assert parked == []
    assert tracker.methods == ["log", "log", "close"]
    assert cursor_of(log) == Position(log.tell(), is_clean=True)


def test_a_file_that_fails_with_all_the_rest_is_given_again(log: MetricLog, recorder: Any) -> None:
    bad = range(2, 2 + 2 * Follower.NUM_TRIES)
    tracker = recorder(
        raising(OSError("network"), lambda method, number: number in bad), ["artifacts"]
    )
    for record in (step_record(0), file_record("bundle"), step_record(1)):
        log.write(record)
    refused: list[tuple[str, str]] = []
    parked: list[str] = []
    follower = make_follower(
        log,
        tracker,
        on_parked=parked.append,
        on_refused=lambda file, reason: refused.append((file, reason)),
    )
    follower.start()
    while len(tracker.steps) < 2:
        assert not follower.join(0.001)
    follower.end("completed")
    assert follower.join(10)
    assert tracker.methods == ["log", "log_artifact", "log", "close"]
    assert parked == ["OSError: network"]
    assert refused == []


@pytest.mark.parametrize("is_before_the_end", [True, False])
def test_a_last_file_that_is_refused_does_not_keep_the_tracker_from_its_end(
    log: MetricLog, recorder: Any, is_before_the_end: bool
) -> None:
    tracker = recorder(refusing("log_artifact"), capabilities=["artifacts"])
    log.write(step_record(0))
    log.write(file_record("bundle"))
    if is_before_the_end:
        log.write({"kind": "end", "status": "completed"})
    refused: list[tuple[str, str]] = []
    follower = follow(log, tracker, on_refused=lambda file, reason: refused.append((file, reason)))
    assert tracker.methods == ["log", "close"]
    assert refused == [("bundle.bin", "ValueError: too large")]
    assert follower.parked_by is None
    assert cursor_of(log) == Position(log.tell(), is_clean=True)


@pytest.mark.parametrize("is_before_the_end", [True, False])
def test_a_last_file_that_fails_with_the_end_is_given_again(
    log: MetricLog, recorder: Any, is_before_the_end: bool
) -> None:
    tracker = recorder(refusing("log_artifact", "close"), capabilities=["artifacts"])
    log.write(step_record(0))
    whole = log.tell()
    log.write(file_record("bundle"))
    if is_before_the_end:
        log.write({"kind": "end", "status": "completed"})
    refused: list[tuple[str, str]] = []
    follower = follow(log, tracker, on_refused=lambda file, reason: refused.append((file, reason)))
    assert follower.parked_by == "ValueError: too large"
    assert refused == []
    assert cursor_of(log) == Position(whole, is_clean=False)
    later = recorder(capabilities=["artifacts"])
    follow(log, later)
    assert later.methods == ["log_artifact", "close"]


# --- after a crash


class Store:
    """Keeps rows, with whatever means against rows that come again."""

    capabilities: frozenset[Any] = frozenset()

    def __init__(self, rows: Rows, *, rewinds: bool = False, is_idempotent: bool = False) -> None:
        self.rows = list(rows)
        self.is_idempotent = is_idempotent
        self.given: list[int] = []
        self.rewound_to: list[int] = []
        if rewinds:
            self.rewind = self._rewind

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.given.append(step)
        if not (self.is_idempotent and (step, metrics) in self.rows):
            self.rows.append((step, metrics))

    def log_params(self, params: Any) -> None: ...
    def log_figure(self, name: str, path: Path, step: int) -> None: ...
    def log_artifact(self, name: str, path: Path) -> None: ...
    def close(self, status: str) -> None: ...

    def _rewind(self, step: int) -> None:
        self.rewound_to.append(step)
        self.rows = [row for row in self.rows if row[0] <= step]


def rows_of(log: MetricLog) -> Rows:
    return [(r["step"], r["metrics"]) for r in read_records(log.path)]


def recover(log: MetricLog, position: Position | None, num_taken: int, **means: bool) -> Store:
    """Follow a log whose first rows a store has taken, with a cursor that may tell of fewer."""
    if position is not None:
        Cursor(log.path.parent, "mine").write(position)
    store = Store(rows_of(log)[:num_taken], **means)
    assert follow(log, store).parked_by is None
    return store


@pytest.mark.parametrize("rewinds", [False, True])
def test_an_idempotent_tracker_is_fed_from_the_beginning_after_a_crash(
    log: MetricLog, rewinds: bool
) -> None:
    write_steps(log, range(1, 6))
    means = {"is_idempotent": True, "rewinds": rewinds}
    store = recover(log, Position(place_behind(log, 2)), num_taken=3, **means)
    assert store.given == [1, 2, 3, 4, 5]
    assert store.rewound_to == []
    assert store.rows == rows_of(log)


def test_an_idempotent_tracker_that_was_closed_goes_on(log: MetricLog) -> None:
    write_steps(log, range(1, 6))
    position = Position(place_behind(log, 2), is_clean=True)
    assert recover(log, position, 2, is_idempotent=True).given == [3, 4, 5]


@pytest.mark.parametrize("num_told", [1, 2, 3, 4])
def test_a_tracker_that_rewinds_is_fed_its_last_step_again_after_a_crash(
    log: MetricLog, num_told: int
) -> None:
    log.write(step_record(1))
    log.write(step_record(2))
    log.write({"kind": "evaluation", "step": 2, "metrics": {"val/loss": 0.5}})
    log.write({"kind": "system", "step": 2, "metrics": {"system/cpu_percent": 9.0}})
    log.write(step_record(3))
    for num_taken in range(num_told, 6):
        store = recover(log, Position(place_behind(log, num_told)), num_taken, rewinds=True)
        assert store.rewound_to == [0 if num_told == 1 else 1]
        assert store.rows == rows_of(log)


def test_a_tracker_that_rewinds_gets_nothing_again_where_the_cursor_tells_of_all(
    log: MetricLog,
) -> None:
    write_steps(log, [1, 2, 3])
    store = recover(log, Position(log.tell()), num_taken=3, rewinds=True)
    assert (store.rewound_to, store.given) == ([3], [])
    log.write(step_record(4))
    store = recover(log, Position(place_behind(log, 3), is_clean=True), 3, rewinds=True)
    assert (store.rewound_to, store.given) == ([], [4])


def test_a_tracker_without_means_goes_on_where_the_cursor_is(log: MetricLog) -> None:
    write_steps(log, range(1, 6))
    for needs_rewind in (False, True):
        position = Position(place_behind(log, 2), needs_rewind=needs_rewind)
        # The third row stands twice, and none is missing.
        assert recover(log, position, num_taken=3).given == [3, 4, 5]


def test_a_damaged_cursor_has_a_tracker_that_rewinds_drop_everything(log: MetricLog) -> None:
    log.write({"kind": "params", "params": {}})
    write_steps(log, [1, 2])
    (log.path.parent / ".mine.cursor").write_text("damaged")
    store = Store([(1, {"train/loss": 1.0})], rewinds=True)
    follow(log, store)
    assert (store.rewound_to, store.given) == ([-1], [1, 2])


def test_a_tracker_that_was_never_fed_is_not_asked_to_rewind(log: MetricLog) -> None:
    write_steps(log, [1, 2])
    store = recover(log, None, num_taken=0, rewinds=True)
    assert (store.rewound_to, store.given) == ([], [1, 2])


@pytest.mark.parametrize("is_idempotent", [False, True])
def test_a_log_that_was_cut_has_a_tracker_drop_what_is_no_longer_true(
    log: MetricLog, is_idempotent: bool
) -> None:
    write_steps(log, [1, 2, 3])
    cut = log.tell()
    log.write(step_record(4, other=1.0))  # instead of what was cut away
    Cursor(log.path.parent, "mine").write(Position(cut, needs_rewind=True))
    taken = [*rows_of(log)[:3], (4, {"train/loss": 4.0}), (5, {"train/loss": 5.0})]
    store = Store(taken, rewinds=True, is_idempotent=is_idempotent)
    follow(log, store)
    assert store.rewound_to == [2]
    assert store.rows == rows_of(log)
    assert not cursor_of(log).needs_rewind


def test_a_log_that_was_cut_is_given_again_to_an_idempotent_tracker_that_cannot_drop(
    log: MetricLog,
) -> None:
    write_steps(log, [1, 2, 3])
    position = Position(place_behind(log, 2), needs_rewind=True)
    assert recover(log, position, num_taken=2, is_idempotent=True).given == [1, 2, 3]


def test_a_rewind_that_fails_is_tried_again_before_anything_is_given(log: MetricLog) -> None:
    write_steps(log, [1, 2, 3])
    Cursor(log.path.parent, "mine").write(Position(place_behind(log, 2)))
    store = Store(rows_of(log)[:3])
    num_tries = 0

    def rewind(step: int) -> None:
        nonlocal num_tries
        num_tries += 1
        if num_tries <= Follower.NUM_TRIES + 1:
            raise OSError("network")
        store._rewind(step)

    store.rewind = rewind
    parked: list[str] = []
    follower = make_follower(log, store, on_parked=parked.append)
    follower.start()
    while len(store.given) < 2:
        assert not follower.join(0.001)
    follower.end("completed")
    assert follower.join(10)
    assert parked == ["OSError: network"]
    assert (store.rewound_to, store.rows) == ([1], rows_of(log))


@given(
    steps=st.lists(st.integers(1, 6), max_size=8),
    cuts=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_a_tracker_that_rewinds_has_all_once_whatever_the_order_of_steps(
    steps: list[int], cuts: tuple[int, int]
) -> None:
    # Figures come before the record of their step, and system metrics may come after the next.
    with tempfile.TemporaryDirectory() as directory:
        log = MetricLog(Path(directory))
        for number, step in enumerate(steps):
            log.write(step_record(step, number=float(number)))
        num_told, num_taken = sorted(cuts)
        position = Position(place_behind(log, num_told))
        store = recover(log, position, num_taken, rewinds=True)
        log.close()
        assert store.rows == rows_of(log)


def test_last_steps_stand_mixed_where_a_record_comes_late(log: MetricLog) -> None:
    write_steps(log, [1, 2, 4])
    start = log.tell()
    write_steps(log, [12, 13, 12, 13])
    log.write({"kind": "end", "status": "failed"})
    for num_records in range(4, 9):
        found = last_steps_before(log.path, place_behind(log, num_records))
        assert found[:2] == (start, 12)
    assert last_steps_before(log.path, log.tell()) == (start, 12, 13)
    assert last_steps_before(log.path, start) == (place_behind(log, 2), 4, 4)
    assert last_steps_before(log.path, 0) == (0, 0, 0)
