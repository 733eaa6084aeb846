"""Trackers that do harm, in real runs: the run ends as it should, and a good one holds it all."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dovetail
from dovetail.run.tracking import read_records

# Not part of the tests' own process: what another one can import lies in files.
PLUGIN = '''
"""Notes calls in a file of the run's folder, or does harm."""

import json, os, sys, threading
from pathlib import Path

from dovetail import hookimpl

dovetail_api = 1
NAME = __name__.removeprefix("planted_")


class Tracker:
    capabilities = frozenset({"params"})

    def __init__(self, run):
        self._path = Path(run.directory) / f"{NAME}.jsonl"
        self._num_calls = 0

    def _note(self, **fields):
        with self._path.open("a") as file:
            file.write(json.dumps(fields) + "\\n")

    def log(self, metrics, step):
        self._num_calls += 1
        HARM
        self._note(step=step, names=sorted(metrics))

    def log_params(self, params):
        self._note(params=len(params))

    def log_figure(self, name, path, step): ...
    def log_artifact(self, name, path): ...

    def close(self, status):
        self._note(status=status)


@hookimpl
def dovetail_log(run):
    return Tracker(run)
'''

HARM = {
    "good": "pass",
    "raises": "raise RuntimeError('the server is on fire')",
    "breaks": "if self._num_calls > 5: raise OSError('connection lost')",
    "flaky": "if self._num_calls % 3 == 0: raise OSError('try again')",
    "sleeps": "threading.Event().wait(30)",
    "exits": "sys.exit(7)",
    "interrupts": "raise KeyboardInterrupt",
    "shouts": "print('x' * 200_000); print('x' * 200_000, file=sys.stderr)",
    "dies": "os._exit(9)",
}
"""What a tracker does before it notes a step."""

PARKED = {
    "raises": "RuntimeError: the server is on fire",
    "breaks": "OSError: connection lost",
    "sleeps": "did not finish within",
    "exits": "SystemExit: 7",
    "interrupts": "KeyboardInterrupt",
}
"""Why it is parked; those that are not here get everything."""


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with one tracker of each kind, on the import path."""
    site = tmp_path / "site"
    info = site / "planted_trackers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-trackers\nVersion: 1.0\n")
    for kind, harm in HARM.items():
        (site / f"planted_{kind}.py").write_text(PLUGIN.replace("HARM", harm))
    entries = [f"{kind} = planted_{kind}\n" for kind in HARM]
    (info / "entry_points.txt").write_text("[dovetail.log]\n" + "".join(entries))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    for kind in HARM:
        monkeypatch.delitem(sys.modules, f"planted_{kind}", raising=False)


@pytest.fixture
def train(config: dict[str, Any], registry: Any, splits: dict[str, Any]) -> Any:
    def run(*trackers: str, follow: str, flush_s: float) -> dovetail.TrainingResult:
        log = {"use": list(trackers), "follow": follow, "flush_s": flush_s}
        own = {"run": {**config["run"], "report": False}, "log": log, "export": {"use": []}}
        model = nn.Linear(6, 2)
        return dovetail.train({**config, **own}, model=model, data=splits, registry=registry)

    return run


def notes_of(run: Path, kind: str) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / f"{kind}.jsonl").read_text().splitlines()]


def check_run(result: dovetail.TrainingResult) -> list[tuple[int, list[str]]]:
    """Check that a run is whole; return its rows, steps with the names of their metrics."""
    assert result.status == "completed"
    records = list(read_records(result.run_dir))
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 10))
    assert len([r for r in records if r["kind"] == "evaluation"]) == 3
    assert (records[-1]["kind"], records[-1]["status"]) == ("end", "completed")
    return [(r["step"], sorted(r["metrics"])) for r in records if r.get("metrics")]


def check_whole(result: dovetail.TrainingResult, kind: str) -> None:
    rows = check_run(result)
    first, *steps, last = notes_of(result.run_dir, kind)
    assert first["params"] > 20
    assert [(note["step"], note["names"]) for note in steps] == rows
    assert last == {"status": "completed"}


@pytest.mark.parametrize("follow", ["process", "thread"])
@pytest.mark.parametrize("bad", PARKED)
def test_run_ends_well_and_the_good_tracker_has_it_all_beside_one_that_is_parked(
    train: Any, bad: str, follow: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(bad, "good", follow=follow, flush_s=5.0)
    check_whole(result, "good")
    assert [*result.parked_trackers] == [bad]
    assert result.parked_trackers[bad].startswith(PARKED[bad])
    (text,) = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert text.startswith(f"tracker {bad!r}: is parked: {PARKED[bad]}")
    assert f"dovetail log sync {result.run_dir}" in text
    steps = [note["step"] for note in notes_of(result.run_dir, bad) if "step" in note]
    assert len(steps) == (5 if bad == "breaks" else 0)


@pytest.mark.parametrize("follow", ["process", "thread"])
def test_tracker_that_raises_now_and_then_gets_everything_once(train: Any, follow: str) -> None:
    result = train("flaky", "good", follow=follow, flush_s=30.0)
    check_whole(result, "flaky")
    check_whole(result, "good")


def test_tracker_that_prints_disturbs_nobody_from_its_process(train: Any, capfd: Any) -> None:
    result = train("shouts", "good", follow="process", flush_s=30.0)
    check_whole(result, "shouts")
    check_whole(result, "good")
    assert capfd.readouterr().out == ""


def test_run_ends_well_where_a_tracker_kills_the_process_of_all_of_them(train: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train("dies", "good", follow="process", flush_s=5.0)
    check_run(result)
    texts = sorted(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    assert len(texts) == 2
    for text, name in zip(texts, ("dies", "good"), strict=True):
        assert text.startswith(f"tracker {name!r}: is parked: their process ended with status 9")


def test_run_leaves_no_thread_but_that_of_a_call_that_hangs(train: Any) -> None:
    before = set(threading.enumerate())
    train("good", follow="process", flush_s=30.0)
    train("good", follow="thread", flush_s=30.0)
    assert set(threading.enumerate()) <= before


def test_step_of_a_run_does_not_wait_for_a_tracker_that_sleeps(train: Any) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        result = train("sleeps", follow="process", flush_s=0.0)
    times = [r["time"] for r in read_records(result.run_dir) if r["kind"] == "step"]
    # A single call that the loop waited for would be 30 s.
    assert times[-1] - times[0] < 25
    assert torch.isfinite(torch.tensor(result.final_metrics["train/loss"]))
