from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dovetail.config import TrainingConfig, parse_config, read_config_file
from dovetail.errors import CheckpointError, ConfigError, RunError
from dovetail.registry.lock import read_lock
from dovetail.run.folder import check_same_run, create_run_folder, find_run, rewrite_config

LOCK = [{"hook": "accumulate", "name": "exact", "distribution": "dovetail", "version": "1"}]


def config_of(tmp_path: Path, **sections: dict[str, Any]) -> TrainingConfig:
    run = {"name": "digits", "dir": str(tmp_path / "runs"), **sections.pop("run", {})}
    config, problems = parse_config({"run": run, **sections})
    assert config is not None, problems
    return config


def test_create_run_folder_writes_config_and_lock(tmp_path: Path) -> None:
    config = config_of(tmp_path, run={"id": "first"}, accumulate={"exact": {"steps": 4}})
    path = create_run_folder(config, LOCK)
    assert path == tmp_path / "runs" / "digits" / "first"
    assert parse_config(read_config_file(path / "config.toml"))[0] == config
    assert read_lock(path) == LOCK


def test_create_run_folder_gives_every_run_a_folder_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    paths = {create_run_folder(config, []) for _ in range(6)}
    assert len(paths) == 6
    assert {path.parent for path in paths} == {tmp_path / "runs" / "digits"}


def test_create_run_folder_never_overwrites(tmp_path: Path) -> None:
    config = config_of(tmp_path, run={"id": "first"})
    path = create_run_folder(config, LOCK)
    (path / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunError) as caught:
        create_run_folder(config, [])
    assert str(caught.value) == (
        f"run folder {str(path)!r}: exists already; expected a new folder. "
        f"Choose another run.id, or go on with it: --resume {path}"
    )
    assert (path / "metrics.jsonl").read_text() == "precious"


def test_create_run_folder_says_that_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match=r"cannot be made: .*Choose another run.dir"):
        create_run_folder(config_of(tmp_path), [])


def test_create_run_folder_leaves_nothing_behind_when_it_cannot_write(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with (
        pytest.raises(RunError, match=r"cannot be written: File too large.*Free space or choose"),
        full_disk(20),
    ):
        create_run_folder(config_of(tmp_path), LOCK)
    assert list((tmp_path / "runs" / "digits").iterdir()) == []


@pytest.mark.parametrize("value", [[1, None], {"inner": [None]}, object()])
def test_create_run_folder_refuses_what_no_file_can_hold_before_there_is_one(
    tmp_path: Path, value: object
) -> None:
    config = config_of(tmp_path, model={"kwargs": {"value": value}})
    with pytest.raises(ConfigError, match=r"^config: "):
        create_run_folder(config, LOCK)
    assert not (tmp_path / "runs").exists()


def test_rewrite_config_puts_another_one_in_its_place(tmp_path: Path) -> None:
    path = create_run_folder(config_of(tmp_path), LOCK)
    other = config_of(tmp_path, train={"epochs": 7})
    rewrite_config(path, other)
    assert parse_config(read_config_file(path / "config.toml"))[0] == other
    assert sorted(p.name for p in path.iterdir()) == ["config.toml", "plugins.lock.json"]


def test_rewrite_config_that_fails_leaves_the_old_one_whole(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = create_run_folder(config, LOCK)
    (path / ".config.toml.partial").mkdir()
    with pytest.raises(RunError, match=r"run folder .* cannot be written: Is a directory"):
        rewrite_config(path, config_of(tmp_path, train={"epochs": 7}))
    assert parse_config(read_config_file(path / "config.toml"))[0] == config


def test_find_run_takes_a_folder_an_id_or_latest(tmp_path: Path) -> None:
    configs = [config_of(tmp_path, run={"id": name}) for name in ("b", "a")]
    older, newer = (create_run_folder(config, []) for config in configs)
    os.utime(older / "config.toml", (1, 1))
    run = configs[0].run
    assert find_run(run, newer) == newer
    assert find_run(run, str(older)) == older
    assert find_run(run, "b") == older
    assert find_run(run, "latest") == newer


@pytest.mark.parametrize("wanted", ["c", "nosuch/folder", "."])
def test_find_run_says_what_is_no_run(
    tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find_run(config_of(tmp_path).run, wanted)
    message = str(caught.value)
    assert message.startswith(f"resume {wanted!r}: is no run's folder, nor an id under ")
    assert repr(str(tmp_path / "runs" / "digits")) in message


def test_find_run_says_that_there_is_no_latest(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits" / "stray").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="resume 'latest': there is no run under"):
        find_run(config_of(tmp_path).run, "latest")


FIXED = ("model.", "train.batch_size", "train.optimizer")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"batch_size": 8, "epochs": 9}},
        {"run": {"id": "first", "seed": 9}},
        {"train": {"batch_size": 8}, "log": {"use": ["tensorboard"]}},
    ],
)
def test_check_same_run_lets_other_settings_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    base: dict[str, Any] = {"run": {"id": "first"}, "train": {"batch_size": 8}}
    path = create_run_folder(config_of(tmp_path, **json.loads(json.dumps(base))), [])
    check_same_run(config_of(tmp_path, **{**base, **changes}), [], path, FIXED)


def test_check_same_run_names_every_setting_that_differs(tmp_path: Path) -> None:
    old = config_of(tmp_path, model={"kwargs": {"width": 3, "depth": 2}}, train={"batch_size": 8})
    path = create_run_folder(old, [])
    new = config_of(
        tmp_path,
        model={"kwargs": {"width": 4, "act": "relu"}},
        train={"batch_size": 16, "optimizer_kwargs": {"eps": 0.1}, "epochs": 5},
    )
    with pytest.raises(CheckpointError) as caught:
        check_same_run(new, [], path, FIXED)
    message = str(caught.value)
    assert message.startswith(f"resume {str(path)!r}: ")
    for difference in (
        "train.batch_size was 8 and is 16",
        "model.kwargs.width was 3 and is 4",
        "model.kwargs.depth was 2 and is None",
        "model.kwargs.act was None and is 'relu'",
        "train.optimizer_kwargs.eps was None and is 0.1",
    ):
        assert difference in message
    assert "epochs" not in message
    assert message.endswith("Resume with the settings it began with, or start a new run.")


def test_check_same_run_tells_a_config_that_was_spoilt(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = create_run_folder(config, [])
    (path / "config.toml").write_text("[train]\nbatch_size = 0\n")
    with pytest.raises(
        CheckpointError, match=r"its config.toml does not fit: config train.batch_size"
    ):
        check_same_run(config, [], path, FIXED)


def test_check_same_run_warns_of_plugins_that_became_others(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = create_run_folder(config, LOCK)
    check_same_run(config, LOCK, path, FIXED)
    check_same_run(config, [*LOCK, {"hook": "log", "name": "csv"}], path, FIXED)
    newer = [{**LOCK[0], "version": "2"}]
    shown = (
        "has begun with other plugins: accumulate plugin 'exact': version was 1, is 2. "
        "It may go on differently; --frozen refuses that."
    )
    with pytest.warns(UserWarning, match=re.escape(shown)):
        check_same_run(config, newer, path, FIXED)
