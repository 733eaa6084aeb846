"""The runs that a tracker is checked with: made, followed, killed and read back."""

from __future__ import annotations

import contextlib
import secrets
import signal
import tempfile
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.run.tracking import LOG_NAME
from dovetail.testing.processes import describe_suite, last_line, run_process
from dovetail.testing.suite import ConformanceError, Suite, expect
from dovetail.testing.tracker.following import (
    Followed,
    Rows,
    describe_difference,
    evaluation_record,
    expected_series,
    following,
    series_of,
    step_record,
)
from dovetail.testing.tracker.run_folder import RUN_FILES, count_bytes, find_strays, write_run_files
from dovetail.types import RunInfo, Tracker

PARAMS: Mapping[str, Any] = {"train.lr": 0.1}
"""Settings of a run, where they do not matter."""

_NUMBERS = (0.1, -2.5, 1 / 3, 1e-30, 1e30, 0.0, 123456789, -7)


@dataclass(frozen=True)
class Finished:
    """A run that was followed to its end."""

    records: list[dict[str, Any]]
    rows: Rows
    parked: list[str]
    size_bytes: int
    """Of all that the tracker left in the run's folder."""
    strays: list[str]
    """What it changed or left where nothing is its own."""


class TrackedRuns(Suite):
    """What the checks of a tracker are made of."""

    hook = "log"
    is_exactly_once: bool = True
    """Whether a record is there once although the process was killed after the tracker took it and
    before the follower noted that it had. The follower hands such records over again; a tracker
    keeps them apart by `rewind`, by `is_idempotent`, or by a store with one place per step and
    metric. One that says `False` should say in its documentation that rows may stand twice after a
    crash, and that the last one of a step counts."""
    is_durable: bool = True
    """Whether a record that the tracker took is in the store after its process was killed: because
    it was there when `log` returned, or because it is given again (`is_idempotent`). One that says
    `False` should say in its documentation that a crash costs it rows which the metric log has."""
    tolerance: float = 0.0
    """Largest relative error of a stored number: 0 for 64 bits, 1e-7 for the 32 of float32."""
    flush_s: float = 30.0
    """Seconds it may take at the end of a run to finish."""

    def read_back(self, directory: Path) -> Rows:
        """Return what the tracker's store under the run's folder holds.

        Args:
            directory: The run's folder. Every tracker of the run is closed, or was killed.

        Returns:
            Optimizer step and metrics of each row, in the store's order. The metrics of one record
            may come as one row or as several; what the store adds by itself is left out.

        Raises:
            unittest.SkipTest: The subclass does not say.
        """
        raise unittest.SkipTest(f"{type(self).__name__} has no read_back(directory)")

    @property
    def _finished(self) -> Finished:
        """A run of ordinary length, followed once for all checks of a subclass."""
        kind = type(self)
        if "_shared" not in vars(kind):
            kind._shared = self._follow_a_run()  # type: ignore[attr-defined]
        shared: Finished = kind._shared  # type: ignore[attr-defined]
        return shared

    def _follow_a_run(self) -> Finished:
        records = []
        for step in range(1, 61):
            index, is_odd = step // 7 - 1, step % 7 == 0
            records.append(step_record(step, **({"odd/number": _NUMBERS[index]} if is_odd else {})))
            if step % 20 == 0:
                records.append(evaluation_record(step, **{"val/accuracy": step / 64}))
        with self._folder() as directory:
            root = directory.parents[1]
            before = write_run_files(directory, root)
            tracker = self._build(directory)
            with self._following(directory, tracker, params=PARAMS) as followed:
                followed.write(records)
            rows = [] if followed.parked else self.read_back(directory)
            strays = find_strays(root, directory, before)
            size_bytes = count_bytes(directory) - sum(map(len, RUN_FILES.values()))
        return Finished(records, rows, followed.parked, size_bytes, strays)

    @contextlib.contextmanager
    def _folder(self, name: str = "run") -> Iterator[Path]:
        """Make the folder of a run; a backend's own process may still write when it is removed."""
        with tempfile.TemporaryDirectory(
            prefix="dovetail-", ignore_cleanup_errors=True
        ) as temporary:
            directory = Path(temporary).resolve() / "conformance" / f"{name}-{secrets.token_hex(4)}"
            directory.mkdir(parents=True)
            yield directory

    def _build(self, directory: Path) -> Tracker:
        """Make the tracker as a run does."""
        registry = self.registry()
        info = RunInfo(directory.parent.name, directory.name, directory, PARAMS)
        return registry.log(self.name, info, self.build_options(registry))

    def _build_one_that(
        self, is_right: Callable[[Any], bool], directory: Path, lacking: str
    ) -> Tracker:
        """Make the tracker, or skip the check for one that says that it cannot."""
        tracker = self._build(directory)
        if not is_right(tracker):
            tracker.close("completed")
            raise unittest.SkipTest(f"the tracker {lacking}")
        return tracker

    def _following(
        self, directory: Path, tracker: Tracker, **arguments: Any
    ) -> AbstractContextManager[Followed]:
        return following(directory, tracker, **{"flush_s": self.flush_s, **arguments})

    def _follow(
        self,
        directory: Path,
        records: Sequence[Mapping[str, Any]],
        tracker: Tracker | None = None,
        status: str = "completed",
    ) -> Rows:
        """Follow a run from beginning to end and read back what it left."""
        made = tracker or self._build(directory)
        with self._following(directory, made, status=status) as followed:
            followed.write(records)
        self._expect_fed(followed.parked)
        return self.read_back(directory)

    def _kill(
        self, directory: Path, records: list[dict[str, Any]], num_before: int, num_after: int
    ) -> tuple[int, int]:
        """Have a process follow the records and die; return step and size of the checkpoint.

        The checkpoint is later than the cursor and earlier than what the tracker took.
        """
        request = {
            **describe_suite(self),
            "directory": str(directory),
            "run_name": directory.parent.name,
            "params": dict(PARAMS),
            "records": records,
            "num_before": num_before,
            "num_after": num_after,
        }
        ended = run_process("tracker/_follow_and_die.py", request)
        if ended.returncode not in (-getattr(signal, "SIGKILL", -1), int(signal.SIGTERM)):
            raise ConformanceError(f"it did not follow in a fresh process: {last_line(ended)}")
        lines = (directory / LOG_NAME).read_bytes().splitlines(keepends=True)
        num_kept = num_before + num_after // 2
        # The first line has the settings.
        return int(records[num_kept - 1]["step"]), sum(map(len, lines[: num_kept + 1]))

    def _expect_after_a_kill(
        self, rows: Rows, records: Sequence[Mapping[str, Any]], num_before: int, told: str
    ) -> None:
        found = series_of(rows, "train/loss")
        if not self.is_durable:
            found = [pair for pair in found if pair[0] > num_before]
            records = records[num_before:]
        if not self.is_exactly_once:
            found = list(dict(found).items())
        difference = describe_difference(
            found, expected_series(records, "train/loss"), self.tolerance
        )
        expect(not difference, f"{told}, {difference}")

    def _expect_series(self, finished: Finished, *names: str) -> None:
        self._expect_fed(finished.parked)
        self._expect_rows(finished.rows, finished.records, *names)

    def _expect_rows(self, rows: Rows, records: Sequence[Mapping[str, Any]], *names: str) -> None:
        for name in names:
            found, wanted = series_of(rows, name), expected_series(records, name)
            difference = describe_difference(found, wanted, self.tolerance)
            expect(not difference, f"metric {name!r}: {difference}")

    def _expect_fed(self, parked: Sequence[str]) -> None:
        expect(not parked, f"it does not take what a run gives it: {' '.join(parked)}")

    def _expect_parked(self, parked: Sequence[str], reason: str) -> None:
        is_parked = len(parked) == 1 and reason in parked[0]
        expect(is_parked, f"a run warned {list(parked)}, not once that the tracker is parked")
