"""Conformance of the `log` hook: what a tracker is given stands in its store, in order and once."""

from __future__ import annotations

import math
import shutil
import threading
import unittest
from collections.abc import Mapping
from typing import Any

from dovetail.run.tracking import read_records
from dovetail.testing.suite import expect
from dovetail.testing.tracker.following import (
    FOLLOWED,
    Proxy,
    evaluation_record,
    expected_series,
    is_near,
    join_follower,
    quick_retries,
    series_of,
    step_record,
)
from dovetail.testing.tracker.holding import METHODS, HoldingChecks
from dovetail.testing.tracker.tracked_runs import PARAMS

_PARAMS: Mapping[str, Any] = {
    "run.name": "größer \N{RIGHTWARDS ARROW} \N{BLACK STAR}",
    "run.seed": 0,
    "train.lr": 1e-3,
    "train.amp": True,
    "train.max_grad_norm": None,
    "model.kwargs.widths": [4, 8],
    "model.kwargs.blocks": [[1, "a"], []],
    "data.kwargs": {},
    "task.note": "",
}
"""Settings of every kind that a config can hold."""

_NON_FINITE = (math.nan, math.inf, -math.inf)


class TrackerSuite(HoldingChecks):
    """Checks of the `log` hook. A subclass says how its store is read back.

    The tracker is fed from a metric log on disk by the follower that a run feeds it by.
    """

    def test_the_suite_can_read_the_store_back(self) -> None:
        """Without it next to nothing could be checked."""
        is_own = type(self).read_back is not TrackerSuite.read_back
        hint = "Override read_back(directory) so that it returns [(step, metrics), ...]."
        expect(is_own, f"{type(self).__name__} does not say how the store is read back. {hint}")

    def test_capabilities_are_known(self) -> None:
        """`capabilities` is a frozenset of names that a run knows, each with its method."""
        with self._folder() as directory:
            tracker = self._build(directory)
            found: Any = tracker.capabilities
            tracker.close("completed")
        known = frozenset(METHODS)
        is_known = isinstance(found, frozenset) and found <= known
        expect(is_known, f"capabilities is {found!r}, no frozenset of {', '.join(sorted(known))}")
        for name in sorted(found):
            method = METHODS[name]
            has_it = callable(getattr(tracker, method, None))
            expect(has_it, f"capabilities names {name!r}, and there is no method {method}")

    def test_every_record_arrives_once_and_in_order(self) -> None:
        """The store holds each optimizer step of a run, in order."""
        self._expect_series(self._finished, "train/loss", "train/lr")

    def test_metrics_of_some_records_arrive(self) -> None:
        """What only evaluations hold stands at their steps, and nowhere else."""
        self._expect_series(self._finished, "val/loss", "val/accuracy")

    def test_numbers_arrive_unchanged(self) -> None:
        """No number is rounded further than the store's own precision, whatever its size."""
        self._expect_series(self._finished, "odd/number")

    def test_only_what_was_logged_is_stored(self) -> None:
        """No metric is made up."""
        logged = {name for record in self._finished.records for name in record["metrics"]}
        made_up = {name for _, metrics in self._finished.rows for name in metrics} - logged
        expect(not made_up, f"the store holds {sorted(made_up)}, which nobody logged")

    def test_nothing_else_is_written(self) -> None:
        """The tracker writes into one folder of its own in the run's folder, and nowhere else."""
        strays = self._finished.strays
        expect(not strays, f"outside of one folder of its own it touched {', '.join(strays)}")

    def test_numbers_that_are_not_finite_stop_nothing(self) -> None:
        """NaN and infinities are stored as such, or left out; the rows around them stay."""
        records = [step_record(1)]
        for step, value in enumerate(_NON_FINITE, start=2):
            records.append(step_record(step, **{"odd/loss": value}))
        records += [step_record(5, **{"odd/loss": 1.5}), step_record(6)]
        with self._folder() as directory:
            rows = self._follow(directory, records)
        self._expect_rows(rows, records, "train/loss")
        logged = dict(expected_series(records, "odd/loss"))
        found = series_of(rows, "odd/loss")
        wrong = [f"{v!r} at step {s}" for s, v in found if not is_near(v, logged[s], 1e-7)]
        expect(not wrong, f"NaN, inf and -inf of steps 2 to 4 became {', '.join(wrong)}")
        expect((5, 1.5) in found, "the first number after NaN and infinities is missing")

    def test_settings_of_every_kind_are_taken(self) -> None:
        """`log_params` takes None, lists, tables, booleans and text; also twice, as resuming does.

        The second time the values are others.
        """
        records = [step_record(1), step_record(2)]
        with self._folder() as directory:
            changed = {**_PARAMS, "train.lr": 2.0}
            for record, params in zip(records, (_PARAMS, changed), strict=True):
                with self._following(directory, self._build(directory), params=params) as followed:
                    followed.write([record])
                self._expect_fed(followed.parked)

    def test_every_status_is_taken(self) -> None:
        """A run may also be interrupted or fail; what was logged before is kept."""
        for status in ("interrupted", "failed"):
            with self._folder() as directory:
                rows = self._follow(directory, [step_record(1)], status=status)
            self._expect_rows(rows, [step_record(1)], "train/loss")

    def test_two_runs_do_not_mix(self) -> None:
        """Two trackers that follow two runs at once keep them apart."""
        with self._folder("one") as one, self._folder("two") as two:
            first = [step_record(step) for step in range(1, 9)]
            second = [step_record(step, **{"only/second": 1.0}) for step in range(5, 15)]
            with (
                self._following(one, self._build(one)) as left,
                self._following(two, self._build(two)) as right,
            ):
                for mine, other in zip(first, second, strict=False):
                    left.write([mine])
                    right.write([other])
                right.write(second[len(first) :])
            self._expect_fed(left.parked + right.parked)
            pairs = [(self.read_back(one), first), (self.read_back(two), second)]
        for rows, records in pairs:
            self._expect_rows(rows, records, "train/loss", "only/second")

    def test_resuming_replaces_what_comes_again(self) -> None:
        """After `rewind` to a step, that which is logged again stands there once."""
        with self._folder() as directory:
            tracker = self._build(directory)
            if not hasattr(tracker, "rewind"):
                tracker.close("completed")
                raise unittest.SkipTest("the tracker has no rewind")
            first = [step_record(step) for step in range(1, 9)]
            with self._following(directory, tracker, status="interrupted") as followed:
                followed.write(first[:5])
                resumed_at = (5, followed.tell())
                followed.write(first[5:])
            self._expect_fed(followed.parked)
            tracker = self._build(directory)
            again = [step_record(step, **{"train/loss": 100.0 + step}) for step in range(6, 11)]
            with self._following(directory, tracker, resumed_at=resumed_at) as followed:
                followed.write(again)
            self._expect_fed(followed.parked)
            rows = self.read_back(directory)
        self._expect_rows(rows, first[:5] + again, "train/loss")

    def test_nothing_is_lost_or_doubled_by_a_kill(self) -> None:
        """A process that follows is killed. The tracker is given the rest, later or by a resume.

        The last few records before the kill were taken by the tracker, and no cursor tells of them;
        the run's checkpoint lies among them.
        """
        num_before, num_after = 10, 5
        records = [step_record(step) for step in range(1, 21)]
        with self._folder() as directory, self._folder("other") as other:
            resumed_at = self._kill(directory, records, num_before, num_after)
            later = other / directory.name
            shutil.copytree(directory, later)
            with self._following(later, self._build(later), params=PARAMS) as followed:
                pass
            self._expect_fed(followed.parked)
            rows = self.read_back(later)
            self._expect_after_a_kill(rows, records, num_before, "after a kill")
            tracker = self._build(directory)
            with self._following(
                directory, tracker, params=PARAMS, resumed_at=resumed_at
            ) as followed:
                followed.write([r for r in records if r["step"] > resumed_at[0]])
            self._expect_fed(followed.parked)
            rows = self.read_back(directory)
        self._expect_after_a_kill(rows, records, num_before, "after a kill and a resume")

    def test_what_is_given_again_is_known(self) -> None:
        """A whole run that an idempotent tracker is given again stands there once."""
        records = [step_record(step) for step in range(1, 13)]
        records.insert(4, evaluation_record(4))
        records += [step_record(13, **{"odd/loss": math.nan}), step_record(14)]
        with self._folder() as directory:
            tracker = self._build_one_that(
                lambda made: getattr(made, "is_idempotent", False), directory, "is not idempotent"
            )
            with self._following(directory, tracker, status="interrupted") as followed:
                followed.write(records[:4])
            self._expect_fed(followed.parked)
            for rest in (records[4:], []):
                # Without a cursor the follower begins at the beginning.
                (directory / f".{FOLLOWED}.cursor").unlink()
                with self._following(directory, self._build(directory)) as followed:
                    followed.write(rest)
                self._expect_fed(followed.parked)
            rows = self.read_back(directory)
        self._expect_rows(rows, records, "train/loss", "train/lr", "val/loss")
        num_found = len(series_of(rows, "odd/loss"))
        expect(num_found <= 1, f"a record with NaN that is given again stands {num_found} times")

    def test_many_rows_at_once_are_like_one_after_the_other(self) -> None:
        """`log_many` takes as many rows as a follower has, and the last one is in the store."""
        records = [step_record(step) for step in range(1001, 1505)]
        rows = [(int(r["step"]), r["metrics"]) for r in records]
        with self._folder() as directory:
            tracker: Any = self._build_one_that(
                lambda made: hasattr(made, "log_many"), directory, "has no log_many"
            )
            tracker.log(rows[0][1], rows[0][0])
            tracker.log_many(rows[1:501])
            tracker.log(rows[501][1], rows[501][0])
            tracker.log_many(rows[502:])
            tracker.close("completed")
            found = self.read_back(directory)
        self._expect_rows(found, records, "train/loss", "train/lr")

    def test_an_error_now_and_then_loses_nothing(self) -> None:
        """A record that the backend refuses once is offered again and stands there once."""
        records = [step_record(step) for step in range(1, 5)]

        def refuse(number: int) -> None:
            if number == 2:  # a second try is number 3
                raise ConnectionError("the backend is not there")

        with self._folder() as directory:
            rows = self._follow(directory, records, Proxy(self._build(directory), refuse))
        self._expect_rows(rows, records, "train/loss")

    def test_an_error_for_good_parks_it_until_later(self) -> None:
        """A backend that fails is given up with one warning; the rest is caught up with later."""
        records = [step_record(step) for step in range(1, 7)]

        def refuse(number: int) -> None:
            if number > 3:
                raise ConnectionError("the backend is not there")

        with self._folder() as directory:
            tracker = self._build(directory)
            with (
                quick_retries(),
                self._following(directory, Proxy(tracker, refuse)) as followed,
            ):
                followed.write(records)
            self._expect_parked(followed.parked, "ConnectionError")
            logged = [r["step"] for r in read_records(directory) if "metrics" in r]
            expect(logged == [1, 2, 3, 4, 5, 6], f"the run logged {logged} instead of 1 to 6")
            tracker.close("completed")
            rows = self._follow(directory, [])
        self._expect_rows(rows, records, "train/loss")

    def test_a_backend_that_hangs_does_not_hold_the_run(self) -> None:
        """The end of a run waits for a backend for a bounded time, and says that it gave up."""
        is_over = threading.Event()

        def hang(number: int) -> None:
            is_over.wait(60)

        with self._folder() as directory:
            tracker = self._build(directory)
            try:
                proxy = Proxy(tracker, hang)
                with self._following(directory, proxy, flush_s=0.05) as followed:
                    followed.write([step_record(1)])
            finally:
                is_over.set()
                join_follower()
                tracker.close("completed")
        self._expect_parked(followed.parked, "did not finish within")
