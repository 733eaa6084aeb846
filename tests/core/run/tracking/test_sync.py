from __future__ import annotations

import _thread
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dovetail import ConfigPath, PluginOptions, hookimpl
from dovetail.errors import ConfigError, MissingDependencyError, RunError
from dovetail.registry import Registry
from dovetail.registry.listing import SESSION
from dovetail.run.tracking import MetricLog, sync
from dovetail.run.tracking.cursor import Cursor
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import FOLLOWERS, RUN, FolderLock, is_locked
from dovetail.run.tracking.session import Tracking
from dovetail.run.tracking.sync import SyncResult, read_status, sync_run, sync_trackers
from dovetail.types import RunInfo

pytestmark = pytest.mark.usefixtures("quick_pauses")

NUM_STEPS = 20
PARAMS: dict[str, Any] = {"train.lr": 0.1}


def write_log(
    directory: Path, steps: range = range(1, NUM_STEPS + 1), end: str | None = "completed"
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    log = MetricLog(directory)
    log.write({"kind": "params", "params": PARAMS})
    for step in steps:
        log.write({"kind": "step", "step": step, "metrics": {"loss": 1 / step}})
    if end is not None:
        log.write({"kind": "end", "status": end})
    log.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_log(tmp_path / "run")
    return tmp_path / "run"


def never() -> Any:
    raise AssertionError("a tracker was made that lacks nothing")


# --- following to the end


def test_sync_hands_over_what_trackers_lack(run: Path, recorder: Any) -> None:
    one, two = recorder(capabilities=["params"]), recorder()
    results = sync_trackers(run, {"one": lambda: one, "two": lambda: two})
    assert results == {"one": SyncResult(NUM_STEPS + 1), "two": SyncResult(NUM_STEPS + 1)}
    for tracker in (one, two):
        assert tracker.rows == [(step, {"loss": 1 / step}) for step in range(1, NUM_STEPS + 1)]
        assert tracker.methods[0] == "log_params"
        assert tracker.status == "completed"
    assert not is_locked(run)
    assert not is_locked(run, FOLLOWERS)


def test_sync_makes_no_tracker_that_has_everything(run: Path, recorder: Any) -> None:
    sync_trackers(run, {"one": recorder})
    expected = {"one": SyncResult(had_everything=True)}
    assert sync_trackers(run, {"one": never}) == expected
    (run / "metrics.jsonl").write_text("")
    assert sync_trackers(run, {"two": never}) == {"two": SyncResult(had_everything=True)}


def test_sync_hands_over_only_what_came_since(run: Path, recorder: Any) -> None:
    sync_trackers(run, {"one": recorder})
    write_log(run, range(NUM_STEPS + 1, NUM_STEPS + 4))
    tracker = recorder()
    assert sync_trackers(run, {"one": lambda: tracker}) == {"one": SyncResult(4)}
    assert tracker.steps == [NUM_STEPS + 1, NUM_STEPS + 2, NUM_STEPS + 3]


def test_sync_counts_records_of_a_tracker_that_takes_several(run: Path, recorder: Any) -> None:
    class Batches(recorder):  # type: ignore[misc]
        def log_many(self, rows: Any) -> None:
            self._take("log_many", [step for step, _ in rows])

    tracker = Batches()
    assert sync_trackers(run, {"one": lambda: tracker}) == {"one": SyncResult(NUM_STEPS + 1)}
    assert tracker.calls[1] == ("log_many", list(range(1, NUM_STEPS + 1)))


@pytest.mark.parametrize("error", [OSError("network"), SystemExit(3)])
def test_sync_parks_a_tracker_that_raises_and_completes_the_others(
    run: Path, recorder: Any, error: BaseException
) -> None:
    def fail(method: str, number: int) -> None:
        if number > 5:
            raise error

    bad, good = recorder(fail), recorder()
    results = sync_trackers(run, {"bad": lambda: bad, "good": lambda: good})
    reason = f"{type(error).__name__}: {error}"
    assert results["bad"] == SyncResult(5, parked_by=reason)
    assert bad.num_calls == 5 + Follower.NUM_TRIES
    assert bad.status is None
    assert results["good"] == SyncResult(NUM_STEPS + 1)
    again = recorder()
    assert sync_trackers(run, {"bad": lambda: again})["bad"].parked_by is None
    assert bad.steps + again.steps == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            MissingDependencyError("plugin 'one': needs a package."),
            "plugin 'one': needs a package.",
        ),
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_sync_goes_on_without_a_tracker_that_cannot_be_made(
    run: Path, recorder: Any, error: BaseException, reason: str
) -> None:
    def make() -> Any:
        raise error

    results = sync_trackers(run, {"bad": make, "good": recorder})
    assert results == {"bad": SyncResult(parked_by=reason), "good": SyncResult(NUM_STEPS + 1)}
    assert not Cursor(run, "bad").exists()


def test_sync_parks_a_tracker_that_cannot_be_rewound(run: Path, recorder: Any) -> None:
    class Stuck(recorder):  # type: ignore[misc]
        def rewind(self, step: int) -> None:
            raise OSError("locked")

    Cursor(run, "one").write(sync.Position(100))
    results = sync_trackers(run, {"one": Stuck})
    assert results == {"one": SyncResult(parked_by="OSError: locked")}


def test_sync_tells_which_files_are_refused(run: Path, recorder: Any) -> None:
    log = MetricLog(run)
    log.write({"kind": "artifact", "name": "bundle", "file": "bundle"})
    log.write({"kind": "step", "step": 21, "metrics": {"loss": 0.0}})
    log.close()

    def refuse(method: str, number: int) -> None:
        if method == "log_artifact":
            raise ValueError("too large")

    result = sync_trackers(run, {"one": lambda: recorder(refuse, ["artifacts"])})["one"]
    assert result == SyncResult(NUM_STEPS + 2, refused={"bundle": "ValueError: too large"})


def test_sync_cuts_off_a_torn_last_line(run: Path, recorder: Any) -> None:
    whole = (run / "metrics.jsonl").read_bytes()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"step","st')
    assert sync_trackers(run, {"one": recorder})["one"].parked_by is None
    assert (run / "metrics.jsonl").read_bytes() == whole
    assert sync_trackers(run, {"one": never})["one"].had_everything


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (["completed"], "completed"),
        (["stopped early"], "completed"),
        (["interrupted"], "interrupted"),
        (["failed"], "failed"),
        ([None], "failed"),
        (["interrupted", None], "failed"),
        (["failed", "completed"], "completed"),
    ],
)
def test_status_is_that_of_the_last_end(
    tmp_path: Path, ends: list[str | None], status: str, recorder: Any
) -> None:
    for end in ends:
        write_log(tmp_path, range(1, 3), end)
    assert read_status(tmp_path / "metrics.jsonl") == status
    tracker = recorder()
    sync_trackers(tmp_path, {"one": lambda: tracker})
    assert tracker.status == status


# --- given once more


def test_sync_gives_everything_again_where_it_is_known_or_dropped(run: Path, recorder: Any) -> None:
    class Knowing(recorder):  # type: ignore[misc]
        is_idempotent = True

    class Dropping(recorder):  # type: ignore[misc]
        def rewind(self, step: int) -> None:
            self._take("rewind", step)

    kinds = {"knowing": Knowing, "dropping": Dropping, "plain": recorder}
    sync_trackers(run, kinds)
    trackers = {name: kind() for name, kind in kinds.items()}
    makers: dict[str, Any] = {name: lambda made=made: made for name, made in trackers.items()}
    results = sync_trackers(run, makers, again=kinds)
    assert {name: result.num_records for name, result in results.items()} == {
        "knowing": NUM_STEPS + 1,
        "dropping": NUM_STEPS + 1,
        "plain": 0,
    }
    assert trackers["dropping"].calls[0] == ("rewind", -1)
    assert trackers["plain"].rows == []


# --- one at a time


@pytest.mark.skipif(os.name == "nt", reason="locks are POSIX ones")
def test_sync_leaves_a_run_alone_that_is_under_way(run: Path, other_process: Any) -> None:
    with other_process(run, RUN) as process:
        with pytest.raises(RunError, match=f"is in use by process {process.pid}") as error:
            sync_trackers(run, {"one": never})
        assert str(run) in str(error.value)
    assert not is_locked(run)


@pytest.mark.skipif(os.name == "nt", reason="locks are POSIX ones")
def test_sync_ends_the_followers_of_a_crashed_run(
    run: Path, recorder: Any, other_process: Any
) -> None:
    with other_process(run, FOLLOWERS) as process:
        results = sync_trackers(run, {"one": recorder}, patience_s=0)
        assert process.wait(10) < 0
    assert results == {"one": SyncResult(NUM_STEPS + 1)}


def test_sync_keeps_others_from_the_trackers(run: Path, recorder: Any) -> None:
    def make() -> Any:
        assert is_locked(run)
        assert is_locked(run, FOLLOWERS)
        return recorder()

    assert sync_trackers(run, {"one": make})["one"].parked_by is None


def test_sync_says_what_is_no_log_or_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no metrics\.jsonl; expected the folder of a run"):
        sync_trackers(tmp_path, {"one": never})
    FolderLock(run, RUN).path.unlink(missing_ok=True)
    FolderLock(run, RUN).path.mkdir()
    with pytest.raises(RunError, match=r"cannot be written: .* Sync a copy"):
        sync_trackers(run, {"one": never})


def test_sync_gives_up_in_order_when_it_is_interrupted(
    run: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "GRACE_S", 0.05)
    release = threading.Event()

    def hang(method: str, number: int) -> None:
        if number == 8:
            _thread.interrupt_main()
            release.wait(30)

    hanging = recorder(hang)
    with pytest.raises(KeyboardInterrupt):
        sync_trackers(run, {"one": lambda: hanging})
    release.set()
    for thread in threading.enumerate():
        if thread.name == "dovetail-one":
            thread.join(10)
    assert hanging.num_calls == 8
    assert hanging.status is None
    assert not is_locked(run)
    assert not is_locked(run, FOLLOWERS)
    rest = recorder()
    assert sync_trackers(run, {"one": lambda: rest})["one"].parked_by is None
    assert hanging.steps + rest.steps == list(range(1, NUM_STEPS + 1))


# --- whom a config names


class Options(PluginOptions):
    mode: str = "offline"


class Stored(PluginOptions):
    store: ConfigPath


class Planted:
    """Notes whom it made trackers for; a wrapper notes that it was passed."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.asked: list[tuple[RunInfo, str]] = []

    @hookimpl
    def dovetail_log(self, run: RunInfo, options: Options) -> Any:
        self.asked.append((run, options.mode))
        return self.make()


class Around:
    """Counts trackers."""

    num_made = 0

    @hookimpl(wrapper=True)
    def dovetail_log(self) -> Any:
        self.num_made += 1
        return (yield)


@pytest.fixture
def planted(recorder: Any) -> Planted:
    return Planted(recorder)


@pytest.fixture
def registry(planted: Planted) -> Registry:
    own = Registry()
    own.register(planted, hook="log", name="mine")
    own.register(Planted(planted.make), hook="log", name="other")
    own.register(Around(), hook="wrap", name="around")
    return own


CONFIG = """
[run]
name = "digits"
plugins = ["around"]
of_a_later_release = 1
[model]
factory = "gone:build_model"
[log]
use = ["mine"]
[log.mine]
mode = "online"
"""


def test_run_is_synced_to_the_trackers_of_its_config(
    run: Path, registry: Registry, planted: Planted
) -> None:
    (run / "config.toml").write_text(CONFIG)
    assert sync_run(run, registry=registry) == {"mine": SyncResult(NUM_STEPS + 1)}
    ((info, mode),) = planted.asked
    assert (info.name, info.id, info.directory, mode) == ("digits", "run", run, "online")
    assert info.params["model.factory"] == "gone:build_model"
    assert sync_run(run, registry=registry)["mine"].had_everything


def test_wrappers_of_the_run_take_part(run: Path, planted: Planted) -> None:
    (run / "config.toml").write_text(CONFIG)
    around, own = Around(), Registry()
    own.register(planted, hook="log", name="mine")
    own.register(around, hook="wrap", name="around")
    sync_run(run, registry=own)
    assert around.num_made == 1


def test_run_is_synced_to_a_tracker_that_it_did_not_have(
    run: Path, registry: Registry, planted: Planted
) -> None:
    (run / "config.toml").write_text(CONFIG)
    assert list(sync_run(run, ["other", "other"], registry=registry)) == ["other"]
    assert planted.asked == []
    assert list(sync_run(run, (), ['log.use=["other"]'], registry=registry)) == ["other"]


def test_overrides_of_its_options_give_a_tracker_everything_again(
    run: Path, registry: Registry, planted: Planted, recorder: Any
) -> None:
    class Knowing(recorder):  # type: ignore[misc]
        is_idempotent = True

    planted.make = Knowing
    (run / "config.toml").write_text(CONFIG)
    sync_run(run, registry=registry)
    results = sync_run(run, ["mine"], ["log.mine.mode=elsewhere"], registry=registry)
    assert results == {"mine": SyncResult(NUM_STEPS + 1)}
    assert [mode for _, mode in planted.asked] == ["online", "elsewhere"]
    assert sync_run(run, ["mine"], ["log.flush_s=1"], registry=registry)["mine"].had_everything


def test_relative_paths_are_meant_from_the_folder_of_the_config(
    tmp_path: Path, registry: Registry, recorder: Any
) -> None:
    class Storing:
        """Notes where its store is."""

        @hookimpl
        def dovetail_log(self, options: Stored) -> Any:
            stores.append(options.store)
            return recorder()

    stores: list[Path] = []
    registry.register(Storing(), hook="log", name="storing")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[log]\nuse = ["storing"]\n[log.storing]\nstore = "a/b"\n')
    with Tracking(MetricLog(run), {}, {}, config_dir=tmp_path / "configs"):
        pass
    sync_run(run, registry=registry)
    assert stores == [tmp_path / "configs" / "a" / "b"]


def test_a_loop_of_ones_own_is_synced_to_whom_is_named(
    run: Path, registry: Registry, planted: Planted
) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.toml .* Name one, as in: --to wandb"):
        sync_run(run, registry=registry)
    sync_run(run, ["mine"], registry=registry)
    ((info, mode),) = planted.asked
    assert (info.name, info.params, mode) == ("metrics", PARAMS, "offline")


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["mien"], [], "option --to: no plugin is called 'mien'; .* Did you mean 'mine'?"),
        (["mine"], ["log.mine.mod=1"], r"config log\.mine\.mod: unknown field"),
        (["mine"], ["log.mien.mode=x"], r"override log\.mien\.mode: .* Did you mean 'log\.mine'?"),
        (["mine"], ["train.lr=1"], r"override train\.lr: .*; expected a setting of log\.mine"),
        (["mine"], ["log.mine.mode"], "is no setting"),
        ([], ["log.use=[]"], "names no tracker"),
        ([], ["log.flush_s=-1"], r"config log\.flush_s: got -1"),
    ],
)
def test_sync_refuses_what_it_cannot_do(
    run: Path, registry: Registry, names: list[str], overrides: list[str], message: str
) -> None:
    (run / "config.toml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=message):
        sync_run(run, names, overrides, registry=registry)
    assert not list(run.glob(".*cursor"))


def test_one_tracker_by_another_name_has_the_cursor_it_was_fed_with(
    run: Path, registry: Registry
) -> None:
    plain, full = "mine", f"{SESSION}:mine"
    for configured, named in ((plain, full), (full, plain)):
        (run / "config.toml").write_text(f'[log]\nuse = ["{configured}"]\n')
        assert list(sync_run(run, [named], registry=registry)) == [configured]
    (run / "config.toml").unlink()
    assert sync_run(run, [full], registry=registry)[plain].had_everything


def test_settings_of_a_run_without_config_are_the_last_ones(
    tmp_path: Path, registry: Registry, planted: Planted
) -> None:
    lines: list[Mapping[str, Any]] = [
        {"kind": "params", "params": {"a": 1}},
        {"kind": "params", "params": {"a": 2}},
        {"kind": "params"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f"damaged\n{text}")
    sync_run(tmp_path, ["mine"], registry=registry)
    assert planted.asked[0][0].params == {"a": 2}
