from __future__ import annotations

import importlib
import json
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dovetail.run.tracking.follower import Follower
from dovetail.testing import ConformanceError, TrackerSuite

TOY = '''
"""A tracker that keeps JSON lines, with a fault where its options ask for one."""

import json
import math
import os
import shutil

from dovetail import PluginOptions, hookimpl

dovetail_api = 1
latest = None


class Options(PluginOptions):
    fault: str = ""


class Tracker:
    capabilities = frozenset(
        {"params", "figures", "artifacts", "texts", "histograms", "graphs"}
    )

    def __init__(self, run, fault):
        global latest
        self.folder, self.fault = run.directory / "lines", fault
        self.run, self.held, self.num = run, [], 0
        self.folder.mkdir(exist_ok=True)
        self.path = latest = self.folder / "rows.jsonl"
        if fault == "truncates when it is opened":
            self.path.write_text("")
        if fault == "has capabilities that are no frozenset":
            self.capabilities = ["params"]
        if fault == "has a capability nobody knows":
            self.capabilities = frozenset({"videos"})
        if fault != "has no rewind":
            self.rewind = self._rewind
        if fault == "says that it has an optional method":
            self.log_text = None
        if fault == "is a tracker of few things":
            self.capabilities = frozenset()
        if fault != "has no log_many":
            self.log_many = self._log_many
        if "idempotent" in fault or "known" in fault:
            self.is_idempotent = True
            del self.rewind
        self.known = self.path.read_text().splitlines() if self.path.exists() else []
        self.is_final = (self.folder / "final").exists()

    def _log_many(self, rows):
        if self.fault == "takes a hundred rows at once":
            rows = rows[:100]
        for step, metrics in rows:
            self.log(metrics, step, is_one=False)

    def log(self, metrics, step, is_one=True):
        metrics, fault, self.num = dict(metrics), self.fault, self.num + 1
        if fault == "loses single rows" and is_one:
            return
        text = json.dumps([step, metrics])
        if fault == "is idempotent" and text in self.known:
            return
        if fault == "is idempotent but for NaN" and text in self.known and "NaN" not in text:
            return
        if fault == "takes a step for known" and any(json.loads(x)[0] == step for x in self.known):
            return
        if fault == "dies on NaN":
            json.dumps(metrics, allow_nan=False)
        if fault == "makes zeros of NaN":
            metrics = {k: v if math.isfinite(v) else 0.0 for k, v in metrics.items()}
        if fault == "rounds":
            metrics = {k: round(v, 6) if math.isfinite(v) else v for k, v in metrics.items()}
        if fault == "stores float16" and "odd/number" in metrics:
            metrics["odd/number"] = metrics["odd/number"] * (1 + 2**-12)
        if fault == "forgets evaluations":
            metrics = {k: v for k, v in metrics.items() if not k.startswith("val/")}
        if fault == "repeats evaluations":
            self.held = metrics if "val/loss" in metrics else self.held
            metrics = {**dict(self.held), **metrics}
        if fault == "makes up a metric":
            metrics["train/perplexity"] = 1.0
        if fault == "drops every tenth" and step % 10 == 3 and 30 < step < 61:
            return
        if fault == "doubles" and step == 41:
            self.write(metrics, step)
        if fault == "refuses rows beyond 50" and 50 < step < 61:
            raise OSError("no more rows")
        if fault == "ignores what comes after the end" and self.is_final:
            return
        if fault == "writes beside its folder":
            (self.run.directory / "rows.txt").write_text("x")
        if fault == "writes beside the run's folder":
            (self.run.directory.parent / "rows.txt").write_text("x")
        if fault == "writes into two folders":
            (self.run.directory / "more").mkdir(exist_ok=True)
            (self.run.directory / "more" / "rows.txt").write_text("x")
        if fault == "writes into a folder of others":
            (self.run.directory / "checkpoints").mkdir(exist_ok=True)
            (self.run.directory / "checkpoints" / "rows.txt").write_text("x")
        if fault == "reorders" and step in (40, 41):
            self.held.append((metrics, step))
            if step == 41:
                self.flush(reversed(self.held))
        elif fault.startswith("buffers"):
            self.held.append((metrics, step))
            if len(self.held) == 8:
                self.flush(self.held)
        else:
            self.write(metrics, step)

    def flush(self, rows):
        for row in rows:
            self.write(*row)
        self.held = []

    def write(self, metrics, step):
        path = latest if self.fault == "mixes runs" else self.path
        with path.open("a") as file:
            file.write(json.dumps([step, metrics]) + "\\n")

    def _rewind(self, step):
        late = {
            "rewinds too little": lambda s: s > step + 1,
            "rewinds by text": lambda s: str(s) > str(step),
        }.get(self.fault, lambda s: s > step)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(x for x in lines if not late(json.loads(x)[0])))

    def log_params(self, params):
        if self.fault == "takes only some settings" and None in params.values():
            raise TypeError("None")
        path = self.folder / "params.json"
        text = json.dumps(dict(params))
        if self.fault == "refuses settings that changed" and path.exists():
            assert path.read_text() == text
        path.write_text(text)

    def log_figure(self, name, path, step):
        if self.fault == "throws figures away":
            return
        shutil.copy(path, self.folder)
        if self.fault == "empties figures":
            path.write_bytes(b"")

    def log_text(self, name, text, step):
        if self.fault == "refuses texts":
            raise TypeError("a text")
        if self.fault == "throws texts away":
            return
        code = "ascii" if self.fault == "takes plain texts only" else "utf-8"
        (self.folder / f"{step}.txt").write_text(text, encoding=code)

    def log_histogram(self, name, counts, edges, step):
        if self.fault == "throws histograms away":
            return
        if self.fault == "divides by a histogram's first count":
            counts = [count / counts[0] for count in counts]
        (self.folder / f"{name.split('/')[-1]}.json").write_text(json.dumps([counts, edges]))

    def log_graph(self, path):
        if self.fault == "throws graphs away":
            return
        if self.fault == "takes tensors only":
            [node["dtype"] for node in json.loads(path.read_text())["nodes"]]
        shutil.copy(path, self.folder)

    def log_artifact(self, name, path):
        if path.is_file():
            shutil.copy(path, self.folder)
        if self.fault == "moves artifacts":
            shutil.move(path, self.folder / "moved")

    def close(self, status):
        if self.fault == "knows no failure" and status == "failed":
            raise KeyError(status)
        if self.fault == "buffers and throws away":
            return
        self.flush(self.held) if isinstance(self.held, list) else None
        if status == "completed":
            (self.folder / "final").touch()


@hookimpl
def dovetail_log(run, options: Options):
    return Tracker(run, options.fault)
'''

READS_BACK = "the_suite_can_read_the_store_back"
CAPABILITIES = "capabilities_are_known"
ORDER = "every_record_arrives_once_and_in_order"
SOME = "metrics_of_some_records_arrive"
NUMBERS = "numbers_arrive_unchanged"
MADE_UP = "only_what_was_logged_is_stored"
STRAYS = "nothing_else_is_written"
NON_FINITE = "numbers_that_are_not_finite_stop_nothing"
SETTINGS = "settings_of_every_kind_are_taken"
FIGURES = "figures_are_kept"
ARTIFACTS = "artifacts_are_taken"
STATUS = "every_status_is_taken"
TWO_RUNS = "two_runs_do_not_mix"
RESUMING = "resuming_replaces_what_comes_again"
KILL = "nothing_is_lost_or_doubled_by_a_kill"
NOW_AND_THEN = "an_error_now_and_then_loses_nothing"
FOR_GOOD = "an_error_for_good_parks_it_until_later"
TEXTS = "texts_are_kept"
HISTOGRAMS = "histograms_are_kept"
GRAPHS = "graphs_are_kept"
KNOWN = "what_is_given_again_is_known"
MANY = "many_rows_at_once_are_like_one_after_the_other"
HANGS = "a_backend_that_hangs_does_not_hold_the_run"

FAULTS = {
    "has capabilities that are no frozenset": CAPABILITIES,
    "has a capability nobody knows": CAPABILITIES,
    "reorders": ORDER,
    "drops every tenth": ORDER,
    "doubles": ORDER,
    "forgets evaluations": SOME,
    "repeats evaluations": SOME,
    "rounds": NUMBERS,
    "stores float16": NUMBERS,
    "makes up a metric": MADE_UP,
    "writes beside its folder": STRAYS,
    "writes beside the run's folder": STRAYS,
    "writes into two folders": STRAYS,
    "writes into a folder of others": STRAYS,
    "dies on NaN": NON_FINITE,
    "makes zeros of NaN": NON_FINITE,
    "takes only some settings": SETTINGS,
    "refuses settings that changed": SETTINGS,
    "throws figures away": FIGURES,
    "empties figures": FIGURES,
    "moves artifacts": ARTIFACTS,
    "says that it has an optional method": CAPABILITIES,
    "refuses texts": TEXTS,
    "throws texts away": TEXTS,
    "takes plain texts only": TEXTS,
    "throws histograms away": HISTOGRAMS,
    "divides by a histogram's first count": HISTOGRAMS,
    "throws graphs away": GRAPHS,
    "takes tensors only": GRAPHS,
    "takes a hundred rows at once": MANY,
    "is idempotent but for NaN": KNOWN,
    "knows no failure": STATUS,
    "mixes runs": TWO_RUNS,
    "has no rewind": KILL,
    "rewinds by text": KILL,
    "buffers until the end": KILL,
    "ignores what comes after the end": FOR_GOOD,
}
"""Faults of a tracker, and the one check that reports each."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_lines_tracker.py").write_text(TOY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("toy_lines_tracker")
    sys.modules.pop("toy_lines_tracker", None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tracker that fails be tried again at once."""
    monkeypatch.setattr(Follower, "PAUSE_S", 0.0)


class LinesSuite(TrackerSuite):
    def read_back(self, directory: Path) -> list[tuple[int, dict[str, float]]]:
        path = directory / "lines" / "rows.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(step, metrics) for step, metrics in map(json.loads, lines)]


def failures_of(toy: ModuleType, fault: str, **attributes: Any) -> dict[str, str]:
    """Run every check against the toy with a fault; return the reasons of those that fail."""
    suite = type("Suite", (LinesSuite,), {"plugin": toy, "options": {"fault": fault}, **attributes})
    return dict(suite().failures())


def test_a_right_tracker_passes_every_check(toy: ModuleType) -> None:
    LinesSuite.check(plugin=toy)
    assert len(LinesSuite.checks()) == 23


@pytest.mark.parametrize(("fault", "check"), FAULTS.items())
def test_a_fault_is_reported_by_its_check_alone(toy: ModuleType, fault: str, check: str) -> None:
    failures = failures_of(toy, fault)
    assert list(failures) == [check], failures
    assert failures[check]


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        ("truncates when it is opened", {FOR_GOOD, KILL, RESUMING}),
        ("buffers and throws away", {ORDER, KILL, STATUS, RESUMING, FOR_GOOD, NON_FINITE}),
        ("refuses rows beyond 50", {ORDER, SOME, NUMBERS}),
        ("is not idempotent", {KNOWN, KILL, FOR_GOOD}),
        ("takes a step for known", {KNOWN}),
        ("loses single rows", {MANY, NOW_AND_THEN, FOR_GOOD}),
    ],
)
def test_a_gross_fault_is_reported_by_every_check_it_touches(
    toy: ModuleType, fault: str, checks: set[str]
) -> None:
    assert checks <= set(failures_of(toy, fault))


def test_a_rewind_that_goes_too_far_is_reported_when_doubled_rows_are_allowed(
    toy: ModuleType,
) -> None:
    wherever_it_is_rewound = {RESUMING, FOR_GOOD}
    lenient = failures_of(toy, "rewinds too little", is_exactly_once=False)
    assert set(lenient) == wherever_it_is_rewound
    assert set(failures_of(toy, "rewinds too little")) == {*wherever_it_is_rewound, KILL}


def test_a_store_that_says_what_it_cannot_do_passes(toy: ModuleType) -> None:
    assert not failures_of(toy, "has no rewind", is_exactly_once=False)
    assert not failures_of(toy, "buffers until the end", is_durable=False)
    assert not failures_of(toy, "stores float16", tolerance=1e-3)
    assert not failures_of(toy, "is a tracker of few things")
    assert not failures_of(toy, "has no log_many")


def test_an_idempotent_tracker_passes_without_a_rewind(toy: ModuleType) -> None:
    assert not failures_of(toy, "is idempotent")


def test_a_suite_that_does_not_say_how_to_read_back_fails_once(toy: ModuleType) -> None:
    with pytest.raises(ConformanceError, match=r"1 of 23 checks failed\n.*Override read_back"):
        TrackerSuite.check(plugin=toy)


def test_a_follower_that_does_not_try_again_is_reported(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Follower, "NUM_TRIES", 1)
    assert list(failures_of(toy, "")) == [NOW_AND_THEN]


def test_a_follower_that_says_nothing_of_a_tracker_that_hangs_is_reported(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Follower, "give_up", lambda self, reason: None)
    assert list(failures_of(toy, "")) == [HANGS]


def test_a_kill_is_not_checked_where_no_process_can_make_the_tracker(toy: ModuleType) -> None:
    class Plugin:
        dovetail_log = staticmethod(toy.dovetail_log)
        lock = open

    suite = type("Suite", (LinesSuite,), {"plugin": Plugin()})()
    with pytest.raises(unittest.SkipTest, match="cannot be pickled"):
        suite.test_nothing_is_lost_or_doubled_by_a_kill()


def test_a_tracker_that_does_not_start_elsewhere_is_reported(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = type("Suite", (LinesSuite,), {"plugin": toy})()
    folder = str(Path(str(toy.__file__)).parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != folder])
    with pytest.raises(ConformanceError, match="No module named 'toy_lines_tracker'"):
        suite.test_nothing_is_lost_or_doubled_by_a_kill()
