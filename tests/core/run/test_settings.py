"""Settings of runs, and how they differ."""

from __future__ import annotations

from pathlib import Path

from dovetail.run.settings import (
    find_differences,
    find_monitor,
    flatten,
    parse_settings,
    read_config_text,
    read_settings,
)


def test_settings_are_those_of_the_config_else_of_the_log(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == {}
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"kind":"params","params":{"lr":0.1}}\n')
    assert read_settings(tmp_path) == {"lr": 0.1}
    (tmp_path / "config.toml").write_text("[train]\nlr = 0.2\nkwargs = {}\n")
    assert read_settings(tmp_path) == {"train.lr": 0.2, "train.kwargs": {}}


def test_settings_of_a_damaged_config_are_none(tmp_path: Path) -> None:
    assert parse_settings("[train") == {}
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    assert read_config_text(tmp_path) is None


def test_differences_are_the_names_whose_values_are_not_all_the_same() -> None:
    found = find_differences([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}, {"a": 1, "b": 2}])
    assert found == {"b": [2, 3, 2]}
    assert find_differences([{"a": 1}, {}]) == {"a": [1, None]}


def test_monitor_is_the_configs_own_else_the_default() -> None:
    assert find_monitor({}) == ("val/loss", "min")
    settings = flatten({"train": {"monitor": "val/f1", "monitor_mode": "max"}})
    assert find_monitor(settings) == ("val/f1", "max")
