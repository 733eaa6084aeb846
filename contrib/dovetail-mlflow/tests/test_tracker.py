from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import pytest

from dovetail import ConfigError
from dovetail.types import RunInfo, Tracker
from dovetail_mlflow import MlflowTracker

MAX = sys.float_info.max


def write_png(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(50))
    return path


def test_run_is_named_tagged_and_ended(track, run, read, store):
    tracker = track(experiment="mine", run_name="first", tags={"team": "a"})
    assert isinstance(tracker, Tracker)
    assert isinstance(tracker, MlflowTracker)
    tracker.log({"train/loss": 0.5, "lr": 1e-3}, 1)
    tracker.log({"train/loss": 0.25}, 2)
    tracker.close("completed")
    tracker.close("completed")
    found = read(run.directory, store)
    assert found.client.get_experiment(found.info.experiment_id).name == "mine"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.info.end_time >= found.info.start_time
    assert (found.data.tags["team"], found.data.tags["dovetail.run_id"]) == ("a", run.id)
    assert found.history == {"train/loss": [(1, 0.5), (2, 0.25)], "lr": [(1, 1e-3)]}


@pytest.mark.parametrize(("status", "expected"), [("interrupted", "KILLED"), ("failed", "FAILED")])
def test_run_that_does_not_complete_is_marked(status, expected, track, run, read, store):
    track().close(status)
    found = read(run.directory, store)
    assert found.info.status == expected
    assert found.client.get_experiment(found.info.experiment_id).name == run.name
    assert found.info.run_name == run.id


def test_default_store_lies_in_the_folder_of_the_run_and_prints_nothing(tmp_path, read, capfd):
    run = RunInfo("digits", "a", tmp_path / "run with space", {})
    tracker = MlflowTracker(run, experiment="e", run_name="r", tags={}, tracking_uri=None)
    tracker.log({"loss": 1.0}, 1)
    tracker.log_artifact("report", write_png(tmp_path / "a.png"))
    tracker.close("completed")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in run.directory.iterdir()] == ["mlflow"]
    names = {path.name for path in (run.directory / "mlflow").iterdir()}
    assert names == {"mlflow.db", "mlartifacts", "run.json"}
    assert read(run.directory).artifacts == ["report/a.png"]


def test_values_that_are_not_finite_are_kept_as_mlflow_can(track, run, read, store):
    tracker = track()
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
        tracker.log({"loss": value}, step)
    (first, *rest) = read(run.directory, store).history["loss"]
    assert first[0] == 0
    assert math.isnan(first[1])
    assert rest == [(1, MAX), (2, -MAX), (3, 1.0)]


def test_names_that_mlflow_refuses_are_changed_and_told(track, run, read, store):
    tracker = track()
    for step in (1, 2):
        tracker.log({"loss@val": step, "loss#val": step + 10, "plain": 0.0}, step)
    found = read(run.directory, store)
    told = {
        tag.removeprefix("dovetail.name."): name
        for tag, name in found.data.tags.items()
        if tag.startswith("dovetail.name.")
    }
    assert sorted(told.values()) == ["loss#val", "loss@val"]
    by_name = {told.get(key, key): rows for key, rows in found.history.items()}
    assert by_name["loss@val"] == [(1, 1.0), (2, 2.0)]
    assert by_name["loss#val"] == [(1, 11.0), (2, 12.0)]


def test_record_of_many_metrics_is_kept_whole(track, run, read, store):
    track().log({f"m{i}": float(i) for i in range(2300)}, 1)
    history = read(run.directory, store).data.metrics
    assert history == {f"m{i}": float(i) for i in range(2300)}


def test_settings_are_kept_whole_however_long_and_many(track, run, read, store, tmp_path):
    params = {f"p{i}": i for i in range(250)}
    params |= {"long": "x" * 7000, "odd@name": True, "none": None, "list": [1, "a"], "empty": ""}
    params["log.mlflow.tracking_uri"] = "postgresql://me:secret@host/db"
    track().log_params(params)
    found = read(run.directory, store)
    assert len(found.data.params) == len(params)
    assert found.data.params["p249"] == "249"
    assert (len(found.data.params["long"]), found.data.params["long"][-1]) == (6000, "…")
    assert found.data.params["log.mlflow.tracking_uri"] == "postgresql://me:***@host/db"
    path = found.client.download_artifacts(found.id, "settings.json", str(tmp_path))
    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    assert kept == {**params, "log.mlflow.tracking_uri": "postgresql://me:***@host/db"}


def test_settings_of_a_resumed_run_are_told_where_they_differ(track, run, read, store, tmp_path):
    track().log_params({"train.epochs": 1, "train.lr": 0.1})
    track().log_params({"train.epochs": 2, "train.lr": 0.1, "new": "x"})
    found = read(run.directory, store)
    assert found.data.params == {"train.epochs": "1", "train.lr": "0.1", "new": "x"}
    assert found.data.tags["dovetail.changed_settings"] == "train.epochs"
    path = found.client.download_artifacts(found.id, "settings.json", str(tmp_path))
    with open(path, encoding="utf-8") as file:
        assert json.load(file)["train.epochs"] == 2


def test_figures_and_artifacts_are_copied(track, run, read, store, tmp_path):
    tracker = track()
    picture = write_png(tmp_path / "picture.png")
    folder = tmp_path / "bundle"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "manifest.json").write_text("{}")
    tracker.log_figure("report/confusion", picture, 7)
    tracker.log_artifact("bundle", folder)
    tracker.log_artifact("report: final", picture)
    found = read(run.directory, store)
    assert found.artifacts[0] == "bundle/deep/manifest.json"
    assert found.artifacts[1] == "figures/report/confusion/step-00000007.png"
    assert found.artifacts[2].startswith("report_ final-")
    path = found.client.download_artifacts(found.id, found.artifacts[1], str(tmp_path / "."))
    with open(path, "rb") as file:
        assert file.read() == picture.read_bytes()


class Lost(Exception):
    """The answer of a store got lost."""


def lose_answers(monkeypatch, tracker, method, num_calls):
    """Let the real call do its work and raise afterwards, as a lost answer does."""
    real, calls = getattr(tracker._client, method), []

    def call(*arguments, **keywords):
        result = real(*arguments, **keywords)
        calls.append(arguments)
        if len(calls) <= num_calls:
            raise Lost
        return result

    monkeypatch.setattr(tracker._client, method, call)
    return calls


def test_record_that_is_tried_again_stands_there_once(track, run, read, store, monkeypatch):
    tracker = track()
    calls = lose_answers(monkeypatch, tracker, "log_batch", 1)
    with pytest.raises(Lost):
        tracker.log({"loss": 0.5, "nan": math.nan}, 3)
    tracker.log({"loss": 0.5, "nan": math.nan}, 3)
    assert len(calls) == 1  # MLflow has it
    tracker.log({"loss": 0.5, "nan": math.nan}, 4)
    history = read(run.directory, store).history
    assert history["loss"] == [(3, 0.5), (4, 0.5)]
    assert len(history["nan"]) == 2


@pytest.mark.parametrize("method", ["set_tag", "log_batch"])
def test_renamed_metric_that_is_tried_again_stands_there_once(
    method, track, run, read, store, monkeypatch
):
    tracker = track()
    lose_answers(monkeypatch, tracker, method, 1)
    with pytest.raises(Lost):
        tracker.log({"loss@val": 0.5}, 1)
    tracker.log({"loss@val": 0.5}, 1)
    tracker.log({"loss@val": 0.25}, 2)
    found = read(run.directory, store)
    assert list(found.history.values()) == [[(1, 0.5), (2, 0.25)]]
    assert "loss@val" in found.data.tags.values()


def test_records_that_are_replayed_stand_there_once(track, run, read, store):
    records = [({"loss": 1 / step, "odd": math.nan}, step) for step in range(1, 9)]
    records[2] = ({"loss": math.inf, "odd": -math.inf}, 3)
    first = track()
    for metrics, step in records[:6]:
        first.log(metrics, step)
    again = track()  # the process was killed: nobody closed the first one
    assert again.run_id == first.run_id
    for metrics, step in records[2:]:
        again.log(metrics, step)
    history = read(run.directory, store).history
    assert [step for step, _ in history["loss"]] == list(range(1, 9))
    assert [step for step, _ in history["odd"]] == list(range(1, 9))


def test_rows_of_many_steps_go_in_few_requests(track, run, read, store, monkeypatch):
    tracker = track()
    calls = lose_answers(monkeypatch, tracker, "log_batch", 0)
    rows = [(step, {f"m{i}": step / 7 + i for i in range(10)}) for step in range(1, 251)]
    tracker.log_many(rows)
    tracker.log_many([])
    assert len(calls) == 3  # 2500 values, 1000 at most in one
    history = read(run.directory, store).history
    assert history == {f"m{i}": [(s, m[f"m{i}"]) for s, m in rows] for i in range(10)}


def test_whole_run_that_is_given_again_costs_no_request_to_write(
    track, run, read, store, monkeypatch
):
    rows = [(step, {"loss": step / 7, "odd": math.nan, "a@b": math.inf}) for step in range(1, 301)]
    track().log_many(rows[:200])
    again = track()
    assert again.is_idempotent
    again.log_many([])
    calls = lose_answers(monkeypatch, again, "log_batch", 0)
    reads = lose_answers(monkeypatch, again, "get_metric_history", 0)
    again.log_many(rows[:150])
    for step, metrics in rows[150:200]:
        again.log(metrics, step)
    assert (len(calls), len(reads)) == (0, 3)  # the history of each metric, once
    again.log_many(rows[200:])
    assert (len(calls), len(reads)) == (1, 3)
    history = read(run.directory, store).history
    assert [[step for step, _ in series] for series in history.values()] == [
        list(range(1, 301))
    ] * 3


def test_rows_whose_answer_got_lost_stand_there_once(track, run, read, store, monkeypatch):
    rows = [(step, {f"m{i}": step / 7 for i in range(10)}) for step in range(1, 251)]
    tracker = track()
    lose_answers(monkeypatch, tracker, "log_batch", 2)
    for _ in range(2):
        with pytest.raises(Lost):
            tracker.log_many(rows)
    tracker.log_many(rows)
    history = read(run.directory, store).history
    assert all(series == [(s, s / 7) for s in range(1, 251)] for series in history.values())


def test_text_is_kept_whole_and_goes_back_with_a_rewind(track, run, read, store, tmp_path):
    tracker, text = track(), "größer\n<b>\u2605" * 1000
    for step in (3, 7):
        tracker.log({"loss": 1.0}, step)
        tracker.log_text("samples/first", text, step)
    names = [f"texts/samples/first/step-{step:08d}.txt" for step in (3, 7)]
    found = read(run.directory, store)
    assert found.artifacts == names
    path = found.client.download_artifacts(found.id, names[0], str(tmp_path))
    with open(path, encoding="utf-8") as file:
        assert file.read() == text
    track().rewind(4)
    assert read(run.directory, store).artifacts == names[:1]


def test_record_whose_first_half_is_there_gets_its_second(track, run, read, store):
    whole = {f"m{i}": float(i) for i in range(10)}
    track().log({name: whole[name] for name in list(whole)[:4]}, 1)
    track().log(whole, 1)
    assert read(run.directory, store).history == {n: [(1, v)] for n, v in whole.items()}


def test_rewind_goes_on_in_the_same_run_where_nothing_came_after(track, run, read, store):
    first = track()
    first.log({"loss": 1.0}, 5)
    first.close("interrupted")
    again = track()
    again.rewind(5)
    again.log({"loss": 0.5}, 6)
    assert again.run_id == first.run_id
    found = read(run.directory, store)
    assert found.history == {"loss": [(5, 1.0), (6, 0.5)]}
    assert found.info.status == "RUNNING"


def test_rewind_goes_on_in_a_new_run_with_the_history(track, run, read, store, tmp_path):
    first = track(run_name="mine", tags={"team": "a"})
    picture = write_png(tmp_path / "p.png")
    for step in range(1, 8):
        first.log({"loss": float(step), "a@b": math.nan}, step)
        first.log_figure("plot", picture, step)
    first.log_artifact("bundle", picture)
    old = read(run.directory, store)
    times = {m.step: m.timestamp for m in old.client.get_metric_history(old.id, "loss")}
    again = track(run_name="mine", tags={"team": "a"})
    again.rewind(4)
    again.log({"loss": 50.0}, 5)
    again.close("completed")
    new = read(run.directory, store)
    assert new.id == again.run_id != old.id
    assert new.history["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    kept = new.client.get_metric_history(new.id, "loss")[:4]
    assert {m.step: m.timestamp for m in kept} == {s: times[s] for s in (1, 2, 3, 4)}
    assert len([key for key in new.history if key.startswith("a_b-")]) == 1
    figures = [f"figures/plot/step-{step:08d}.png" for step in (1, 2, 3, 4)]
    assert new.artifacts == ["bundle/p.png", *figures]
    assert new.data.tags["dovetail.resumed_from"] == old.id
    assert new.data.tags["dovetail.resumed_at_step"] == "4"
    assert (new.data.tags["team"], new.info.run_name) == ("a", "mine")
    stale = new.client.get_run(old.id)
    assert (stale.data.tags["dovetail.superseded_by"], stale.info.status) == (new.id, "KILLED")
    assert len(new.client.get_metric_history(old.id, "loss")) == 7


def test_rewind_that_was_broken_off_is_done_again(track, run, read, store, tmp_path, monkeypatch):
    first = track(experiment="broken-off")
    first.log({"loss": 1.0}, 1)
    first.log({"loss": 2.0}, 2)
    first.log_artifact("p", write_png(tmp_path / "p.png"))
    calls = lose_answers(monkeypatch, first, "log_artifacts", 1)
    with pytest.raises(Lost):
        first.rewind(1)
    first.rewind(1)
    assert len(calls) == 2
    found = read(run.directory, store)
    assert found.history == {"loss": [(1, 1.0)]}
    runs = found.client.search_runs([found.info.experiment_id])
    assert len(runs) == 2  # the old one and the new one


def test_run_that_is_gone_from_the_store_is_made_again(track, run, read, store, tmp_path):
    first = track()
    first._client.delete_run(first.run_id)
    second = track()
    assert second.run_id != first.run_id
    third = track(tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    assert third.run_id != second.run_id
    (run.directory / "mlflow" / "run.json").write_text("{")
    assert track().run_id not in {first.run_id, second.run_id, third.run_id}


def test_user_keeps_the_active_run(track, run, read, store, tmp_path):
    import mlflow

    before = mlflow.get_tracking_uri()
    mine = f"sqlite:///{tmp_path / 'mine.db'}"
    mlflow.set_tracking_uri(mine)
    try:
        mlflow.create_experiment("mine", artifact_location=(tmp_path / "a").as_uri())
        with mlflow.start_run(
            experiment_id=mlflow.get_experiment_by_name("mine").experiment_id
        ) as active:
            tracker = track()
            tracker.log({"loss": 1.0}, 1)
            tracker.log_params({"a": 1})
            tracker.close("completed")
            assert mlflow.active_run().info.run_id == active.info.run_id
            mlflow.log_metric("own", 2.0)
        assert mlflow.get_tracking_uri() == mine
        assert mlflow.get_run(active.info.run_id).data.metrics == {"own": 2.0}
    finally:
        mlflow.set_tracking_uri(before)
    assert list(read(run.directory, store).history) == ["loss"]


def test_server_that_does_not_answer_is_told_at_once(track):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConfigError) as raised:
        track(tracking_uri=f"http://me:secret@127.0.0.1:{port}")
    assert f"no server answers at http://me:***@127.0.0.1:{port}" in str(raised.value)
    assert "remove log.mlflow.tracking_uri" in str(raised.value)


def test_experiment_that_was_deleted_is_told_with_the_way_out(track):
    tracker = track(experiment="gone")
    found = tracker._client.get_experiment_by_name("gone").experiment_id
    tracker._client.delete_experiment(found)
    with pytest.raises(ConfigError, match=rf"'gone' was deleted.*restore -x {found}"):
        track(experiment="gone")


def test_tag_that_mlflow_refuses_is_told(track):
    with pytest.raises(ConfigError, match=r"refuses the run.*mlflow\.runName"):
        track(run_name="one", tags={"mlflow.runName": "another"})


def test_store_that_is_no_database_is_told(track, tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(ConfigError, match=r"cannot open the store.*mlflow\.db"):
        track(tracking_uri=f"sqlite:///{path}")


def test_mlflow_sends_no_telemetry_unless_the_user_says_so(track, tmp_path, monkeypatch):
    code = (
        "import sys; from pathlib import Path; from dovetail_mlflow._store import connect\n"
        "connect(f'sqlite:///{sys.argv[1]}/mlflow.db')\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "sys.exit(get_telemetry_client() is not None)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST")}
    environment["HOME"] = str(tmp_path / "home")
    environment.pop("MLFLOW_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert not (tmp_path / "home").exists()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    track().close("completed")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_plugin_is_found_and_imports_nothing_heavy():
    code = (
        "import sys; from dovetail.registry import Registry\n"
        "Registry().build_options('log', 'mlflow', {})\n"
        "sys.exit(bool({'mlflow', 'sqlalchemy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
