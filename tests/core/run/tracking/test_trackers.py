from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, PluginError
from dovetail.registry import Registry
from dovetail.run.tracking.session import Tracking, open_log
from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
from dovetail.types import RunInfo

# Not part of the tests' own process: what another one can import lies in files.
PLUGINS = '''
"""Trackers that note where they were made, and a wrapper that does."""

import json, os
from pathlib import Path
from typing import Any

from dovetail import ConfigPath, PluginOptions, hookimpl

dovetail_api = 1


def note(run, kind, **fields):
    with (Path(run.directory) / f"{kind}.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **fields}) + "\\n")


class Options(PluginOptions):
    folder: ConfigPath | None = None
    """A folder."""
    callback: Any = None
    """Anything."""
    needs_training_process: bool = False
    """Whether it is made where the training is."""


class Noting:
    capabilities = frozenset()

    def __init__(self, run):
        self.run = run

    def log(self, metrics, step):
        note(self.run, "rows", step=step)

    def log_params(self, params): ...
    def log_figure(self, name, path, step): ...
    def log_artifact(self, name, path): ...
    def close(self, status): ...


class Plugin:
    @hookimpl
    def dovetail_log(self, run, options: Options):
        note(run, "made", name=run.name, params=run.params, folder=str(options.folder))
        return Noting(run)


class Wrapper:
    """Wraps trackers and collators."""

    @hookimpl(wrapper=True)
    def dovetail_log(self, run):
        note(run, "wrapped")
        return (yield)

    @hookimpl(wrapper=True)
    def dovetail_collate(self):
        return (yield)


plugin, wrapper = Plugin(), Wrapper()
'''


@pytest.fixture(autouse=True)
def planted(site: Any) -> None:
    module = "planted_trackers"
    entry_points = {
        "dovetail.log": {"one": f"{module}:plugin", "two": f"{module}:plugin"},
        "dovetail.plugins": {"around": f"{module}:wrapper"},
    }
    site.add("planted", entry_points, **{module: PLUGINS})


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    directory = tmp_path / "run-1"
    directory.mkdir()
    return RunInfo("mine", directory.name, directory, {"a.b": 1})


class MyTracker:
    """A tracker of this session."""

    capabilities: frozenset[Any] = frozenset()

    def log(self, metrics: Any, step: int) -> None: ...
    def log_params(self, params: Any) -> None: ...
    def log_figure(self, name: str, path: Path, step: int) -> None: ...
    def log_artifact(self, name: str, path: Path) -> None: ...
    def close(self, status: str) -> None:
        self.status = status


class MyPlugin:
    """Makes trackers, and knows them."""

    def __init__(self) -> None:
        self.made: list[MyTracker] = []

    @hookimpl
    def dovetail_log(self, run: RunInfo) -> MyTracker:
        self.made.append(MyTracker())
        return self.made[-1]


class MyWrapper:
    @hookimpl(wrapper=True)
    def dovetail_log(self, options: PluginOptions) -> Iterator[None]:
        return (yield)  # type: ignore[return-value]


class MyCollateWrapper:
    @hookimpl(wrapper=True)
    def dovetail_collate(self, options: PluginOptions) -> Iterator[None]:
        return (yield)  # type: ignore[return-value]


def choose(registry: Registry, name: str, table: dict[str, Any] | None = None) -> TrackerChoice:
    return TrackerChoice(registry.build_options("log", name, table or {}), table or {})


def make(
    registry: Registry, run: RunInfo, *chosen: str, **arguments: Any
) -> tuple[dict[str, Any], list[str]]:
    """Make trackers, follow a run of one step, and return those of this process and the others."""
    choices = {name: choose(registry, name) for name in chosen}
    choices |= arguments.pop("choices", {})
    trackers, sidecar = make_trackers(registry, run, choices, **arguments)
    elsewhere = [] if sidecar is None else list(sidecar._request.trackers)
    with Tracking(open_log(run.directory), trackers, run.params, sidecar) as tracking:
        tracking.log.write({"kind": "step", "step": 1, "metrics": {"train/loss": 1.0}})
    assert tracking.parked == {}
    return trackers, elsewhere


def notes_of(run: RunInfo, name: str) -> list[dict[str, Any]]:
    path = run.directory / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pids_of(run: RunInfo, name: str) -> set[int]:
    return {note["pid"] for note in notes_of(run, name)}


def history_of(registry: Registry) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(h.hook, [(c.info.name, c.result) for c in h.calls]) for h in registry.history]


def test_installed_trackers_are_made_in_one_process_of_their_own(run: RunInfo) -> None:
    registry = Registry()
    assert make(registry, run, "one", "two") == ({}, ["one", "two"])
    assert len(pids_of(run, "made")) == 1
    assert pids_of(run, "made") == pids_of(run, "rows") != {os.getpid()}
    assert [(n["name"], n["params"]) for n in notes_of(run, "made")] == [("mine", {"a.b": 1})] * 2
    assert len(notes_of(run, "rows")) == 2
    assert history_of(registry) == [("log", [("one", "Noting")]), ("log", [("two", "Noting")])]
    assert all(call.duration_s > 0 for h in registry.history for call in h.calls)


def test_trackers_are_made_here_where_the_config_says_so(run: RunInfo) -> None:
    registry = Registry()
    trackers, elsewhere = make(registry, run, "one", follow="thread")
    assert (list(trackers), elsewhere) == (["one"], [])
    assert pids_of(run, "made") == pids_of(run, "rows") == {os.getpid()}
    assert history_of(registry) == [("log", [("one", "Noting")])]


@pytest.mark.parametrize("table", [{"needs_training_process": True}, {"callback": object()}])
def test_a_tracker_that_cannot_be_made_elsewhere_is_made_here_beside_others(
    run: RunInfo, table: dict[str, Any]
) -> None:
    registry = Registry()
    choices = {"two": choose(registry, "two", table), "one": choose(registry, "one")}
    trackers, elsewhere = make(registry, run, choices=choices)
    assert (list(trackers), elsewhere) == (["two"], ["one"])
    assert len(pids_of(run, "rows") - {os.getpid()}) == 1
    assert os.getpid() in pids_of(run, "rows")
    assert history_of(registry) == [("log", [("two", "Noting")]), ("log", [("one", "Noting")])]


def test_a_tracker_of_this_session_stays_in_it(run: RunInfo) -> None:
    registry = Registry()
    registry.register(MyPlugin(), hook="log", name="one")
    trackers, elsewhere = make(registry, run, "one")
    assert elsewhere == []
    assert isinstance(trackers["one"], MyTracker)


def test_trackers_stay_where_there_is_no_interpreter_for_another_process(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an application that embeds Python.
    monkeypatch.setattr(sys, "executable", "")
    trackers, elsewhere = make(Registry(), run, "one")
    assert (list(trackers), elsewhere) == (["one"], [])


def test_a_wrapper_that_is_installed_goes_with_the_trackers(run: RunInfo) -> None:
    registry = Registry(["around"])
    assert make(registry, run, "one") == ({}, ["one"])
    assert pids_of(run, "wrapped") == pids_of(run, "made") != {os.getpid()}
    assert history_of(registry) == [("log", [("around", "Noting"), ("one", "Noting")])]


def test_a_wrapper_of_this_session_keeps_the_trackers_here(run: RunInfo) -> None:
    registry = Registry(["mine", "around"])
    registry.register(MyWrapper(), hook="wrap", name="mine")
    trackers, elsewhere = make(registry, run, "one")
    assert (list(trackers), elsewhere) == (["one"], [])
    assert pids_of(run, "wrapped") == {os.getpid()}
    names = [("mine", "Noting"), ("around", "Noting"), ("one", "Noting")]
    assert history_of(registry) == [("log", names)]


def test_a_wrapper_of_this_session_around_other_hooks_keeps_no_tracker_here(run: RunInfo) -> None:
    registry = Registry(["mine", "around"])
    registry.register(MyCollateWrapper(), hook="wrap", name="mine")
    assert make(registry, run, "one") == ({}, ["one"])
    assert history_of(registry) == [("log", [("around", "Noting"), ("one", "Noting")])]


@pytest.mark.parametrize("follow", ["process", "thread"])
def test_relative_paths_are_meant_from_the_folder_of_the_config(
    run: RunInfo, tmp_path: Path, follow: str
) -> None:
    registry, table = Registry(), {"folder": "data"}
    options = registry.build_options("log", "one", table, tmp_path)
    choices = {"one": TrackerChoice(options, table)}
    make(registry, run, choices=choices, follow=follow, config_dir=tmp_path)
    (note,) = notes_of(run, "made")
    assert (note["folder"], note["pid"] == os.getpid()) == (
        str(tmp_path / "data"),
        follow == "thread",
    )


def test_a_tracker_of_another_distribution_is_named_in_full(run: RunInfo) -> None:
    assert make(Registry(), run, "planted:one") == ({}, ["planted:one"])


def test_an_error_in_the_other_process_is_the_error_of_here(run: RunInfo) -> None:
    registry = Registry()
    options = registry.build_options("log", "one", {})
    choices = {"one": TrackerChoice(options, {"colour": "red"})}
    with pytest.raises(ConfigError, match=r"config log\.one"):
        make_trackers(registry, run, choices)


def test_trackers_that_were_made_are_closed_where_another_one_cannot_be(run: RunInfo) -> None:
    registry, mine = Registry(), MyPlugin()
    registry.register(mine, hook="log", name="mine")
    options = registry.build_options("log", "one", {})
    choices = {"mine": choose(registry, "mine"), "one": TrackerChoice(options, {"colour": "red"})}
    with pytest.raises(ConfigError, match=r"config log\.one"):
        make_trackers(registry, run, choices)
    assert [tracker.status for tracker in mine.made] == ["failed"]
    with pytest.raises(PluginError, match="no plugin is called 'three'"):
        make_trackers(registry, run, {"three": TrackerChoice(options)})
