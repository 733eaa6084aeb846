from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail import PluginOptions
from dovetail.errors import LockError
from dovetail.registry.listing import PluginInfo
from dovetail.registry.lock import (
    check_lock,
    compare_locks,
    core_row,
    describe_changes,
    files_digest,
    lock_digest,
    lock_row,
    read_lock,
    write_lock,
)

INFO = PluginInfo("export", "zip", "acme", "1.2", "planted_zip")


@pytest.fixture
def rows(site: Any) -> list[dict[str, str]]:
    """A lock of dovetail itself and one planted plugin."""
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip="x = 1\n")
    return [core_row(), lock_row(INFO, PluginOptions())]


def test_lock_is_read_as_it_was_written(rows: list[dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "plugins.lock.json").write_text(write_lock(rows))
    assert read_lock(tmp_path) == rows
    assert read_lock(tmp_path / "plugins.lock.json") == rows
    assert json.loads(write_lock(rows))["digest"] == lock_digest(rows)


def test_files_digest_sees_every_file_and_imports_nothing(tmp_path: Path, site: Any) -> None:
    package = site.path / "planted_pack"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "inner" / "table.json").write_text("{}")
    before = files_digest("planted_pack.inner.part:thing")
    assert len(before) == 64
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("compiled")
    assert files_digest("planted_pack") == before
    (package / "inner" / "table.json").write_text("{ }")
    changed = files_digest("planted_pack")
    assert changed != before
    (package / "inner" / "table.json").rename(package / "inner" / "other.json")
    assert files_digest("planted_pack") not in (before, changed)


def test_files_digest_of_a_namespace_package_is_that_of_the_part_in_it(site: Any) -> None:
    for owner in ("one", "two"):
        (site.path / "planted_space" / owner).mkdir(parents=True)
        (site.path / "planted_space" / owner / "__init__.py").write_text(f"name = '{owner}'\n")
    one = files_digest("planted_space.one")
    (site.path / "planted_space" / "two" / "__init__.py").write_text("name = 'new'\n")
    assert files_digest("planted_space.one") == one
    (site.path / "planted_space" / "one" / "__init__.py").write_text("name = 'new'\n")
    assert files_digest("planted_space.one") != one


def test_files_digest_of_what_is_not_there_is_empty() -> None:
    assert files_digest("no_such_module.at_all") == ""


def test_equal_locks_have_no_differences(rows: list[dict[str, str]]) -> None:
    assert compare_locks(rows, [dict(row) for row in rows]) == []
    check_lock(rows, rows, "lock 'x'")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"version": "1.3"}, "export plugin 'zip': version was 1.2, is 1.3"),
        ({"distribution": "evil"}, "export plugin 'zip': distribution was acme, is evil"),
        ({"files_sha256": "0"}, "export plugin 'zip': the files of acme 1.2 were changed"),
        ({"options_sha256": "0"}, "export plugin 'zip': its options differ"),
        ({"name": "tar"}, "export plugin 'tar' takes part, and is not in the lock"),
    ],
)
def test_check_lock_refuses_anything_else_and_says_what_differs(
    rows: list[dict[str, str]], change: dict[str, str], shown: str
) -> None:
    with pytest.raises(LockError) as caught:
        check_lock(rows, [rows[0], {**rows[1], **change}], "lock 'x'")
    assert str(caught.value).startswith("lock 'x': ")
    assert shown in str(caught.value)


def test_check_lock_refuses_a_plugin_less_and_another_order(rows: list[dict[str, str]]) -> None:
    with pytest.raises(LockError, match="export plugin 'zip' is in the lock, and takes no part"):
        check_lock(rows, rows[:1], "lock 'x'")
    with pytest.raises(LockError, match="the order is zip, dovetail, not dovetail, zip"):
        check_lock(rows, rows[::-1], "lock 'x'")


def test_describe_changes_tells_of_releases_and_files_only(rows: list[dict[str, str]]) -> None:
    other = {**rows[1], "options_sha256": "0"}
    assert describe_changes(rows, [rows[0], other, {"hook": "log", "name": "new"}]) == []
    assert describe_changes(rows, [{**rows[0], "version": "9"}]) == [
        f"dovetail: version was {rows[0]['version']}, is 9"
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{", "is no lock of a run"),
        ("[]", "is no lock of a run"),
        ('{"lock_version": 1}', "is no lock of a run"),
        ('{"lock_version": 99, "digest": "", "plugins": []}', "has the format 99; expected 1"),
        ('{"lock_version": 1, "digest": "0", "plugins": []}', "its rows do not have the digest"),
    ],
)
def test_read_lock_refuses_what_no_run_wrote(tmp_path: Path, text: str, shown: str) -> None:
    path = tmp_path / "plugins.lock.json"
    path.write_text(text)
    with pytest.raises(LockError) as caught:
        read_lock(path)
    assert str(caught.value).startswith(f"lock {str(path)!r}: {shown}")


def test_read_lock_says_where_locks_are_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(LockError, match=r"not found\. Every run writes one, plugins\.lock\.json"):
        read_lock(tmp_path / "none.json")
