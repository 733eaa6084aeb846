"""Runs are found by folder, by id, or as the latest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.errors import RunError
from dovetail.run.lookup import find_runs, is_run, resolve_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for age, name in enumerate(("b/two", "a/one", "a/two", "plain")):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("")
        os.utime(path / "metrics.jsonl", (1000 - age, 1000 - age))
    (tmp_path / "a" / "nothing").mkdir()
    inside = tmp_path / "plain" / "media"
    inside.mkdir()
    (inside / "metrics.jsonl").write_text("")
    return tmp_path


def test_runs_are_found_under_a_folder_but_not_inside_runs(root: Path) -> None:
    found = [str(path.relative_to(root)) for path in find_runs(root)]
    assert found == [str(Path(p)) for p in ("a/one", "a/two", "b/two", "plain")]
    assert list(find_runs(root / "plain")) == [root / "plain"]
    assert list(find_runs(root / "absent")) == []


def test_run_is_also_a_folder_that_is_about_to_have_a_log(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert not is_run(tmp_path)  # any project may have a config of that name
    (tmp_path / "plugins.lock.json").write_text("")
    assert is_run(tmp_path)
    assert list(find_runs(tmp_path)) == [tmp_path]


def test_resolve_takes_a_folder_an_id_a_name_with_id_and_latest(root: Path) -> None:
    assert resolve_run(str(root / "plain"), Path("elsewhere")) == root / "plain"
    assert resolve_run("one", root) == root / "a" / "one"
    assert resolve_run("b/two", root) == root / "b" / "two"
    assert resolve_run("latest", root) == root / "b" / "two"


def test_resolve_says_what_is_wrong(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is the id of several: .*two.*two; expected one run"):
        resolve_run("two", root)
    with pytest.raises(RunError, match=r"Did you mean 'plain'\?"):
        resolve_run("plian", root)
    with pytest.raises(RunError, match="List them: dovetail runs"):
        resolve_run("xyzzy", root)
    with pytest.raises(RunError, match=r"there is no run under .*--dir DIR"):
        resolve_run("latest", root / "a" / "nothing")
