"""What installations leave behind, found from files and metadata alone."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dovetail.registry.checkup import (
    Finding,
    check_installs,
    check_names,
    editable_folder,
    find_installed,
)
from dovetail.registry.listing import PluginInfo

EXPLODES = "raise RuntimeError('imported, though nobody asked for it')"


def add(site: Any, distribution: str, module: str, **modules: str) -> Path:
    """Install a distribution whose one plugin is `module`; return its `dist-info` folder."""
    site.add(distribution, {"dovetail.log": {"mine": module}}, **modules)
    return Path(site.path / f"{distribution.replace('-', '_')}-1.2.dist-info")


def make_editable(info: Path, folder: Path) -> None:
    content = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(content))


def about(name: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if name in finding.text]


def test_checkup_finds_nothing_where_nothing_is_wrong(site: Any) -> None:
    add(site, "good-tools", "checked_good", checked_good=EXPLODES)
    assert [i.name for i in find_installed() if i.path.parent == site.path] == ["good-tools"]
    assert about("good", check_installs()) == []


def test_checkup_leaves_out_distributions_without_plugins(site: Any) -> None:
    site.add("other-tools", {"console_scripts": {"x": "x:main"}})
    assert not [i for i in find_installed() if i.path.parent == site.path]


def test_checkup_finds_a_folder_without_metadata(site: Any) -> None:
    info = add(site, "half-tools", "checked_half")
    (info / "METADATA").unlink()
    (found,) = about("half_tools", check_installs())
    assert found.kind == "broken"
    assert "offers plugins (log mine) and has no METADATA" in found.text
    assert found.remedy == "Delete the folder, then: pip install --force-reinstall half-tools"


def test_checkup_finds_two_versions_side_by_side(site: Any) -> None:
    info = add(site, "double-tools", "checked_double", checked_double=EXPLODES)
    shutil.copytree(info, info.with_name("double_tools-1.3.dist-info"))
    (found,) = about("double", check_installs())
    assert found.kind == "broken"
    assert "double_tools-1.2.dist-info and double_tools-1.3.dist-info lie" in found.text


def test_checkup_notes_a_copy_in_another_folder(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = add(site, "double-tools", "checked_double", checked_double=EXPLODES)
    other = tmp_path / "other"
    shutil.copytree(info, other / info.name)
    monkeypatch.setattr(sys, "path", [*sys.path, str(other)])
    (found,) = about("double", check_installs())
    assert found.kind == "note"
    assert found.text.endswith(f" and in {other / info.name}; the first one counts.")


def test_checkup_finds_an_entry_point_without_a_module(site: Any) -> None:
    add(site, "gone-tools", "checked_gone.sub:plugin")
    (found,) = about("gone", check_installs())
    assert found.kind == "broken"
    assert found.explains == {"checked_gone.sub:plugin"}
    assert found.remedy == "pip install --force-reinstall gone-tools"


def test_checkup_finds_an_editable_install_whose_folder_is_gone(site: Any, tmp_path: Path) -> None:
    info = add(site, "edit-tools", "checked_edit")
    make_editable(info, tmp_path / "moved away")
    (found,) = about("edit-tools", check_installs())
    assert "'edit-tools': was installed to be edited in" in found.text
    assert "moved away', which is gone." in found.text
    assert found.explains == {"checked_edit"}


def test_checkup_finds_a_module_that_hides_a_plugin(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = add(site, "hidden-tools", "checked_hidden", checked_hidden=EXPLODES)
    (info / "RECORD").write_text("checked_hidden.py,,\nhidden_tools-1.2.dist-info/METADATA,,\n")
    assert about("hidden", check_installs()) == []
    here = tmp_path / "here"
    here.mkdir()
    (here / "checked_hidden.py").write_text(EXPLODES)
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    importlib.invalidate_caches()
    (found,) = about("hidden", check_installs())
    assert found.kind == "broken"
    assert f"is hidden by {str(here / 'checked_hidden.py')!r}" in found.text


def test_checkup_finds_a_module_that_hides_an_editable_plugin(site: Any, tmp_path: Path) -> None:
    info = add(site, "edit-tools", "checked_edit", checked_edit=EXPLODES)
    folder = tmp_path / "sources"
    folder.mkdir()
    make_editable(info, folder)
    (found,) = about("edit-tools", check_installs())
    assert "is hidden by" in found.text
    make_editable(info, site.path)
    assert about("edit-tools", check_installs()) == []


def test_checkup_notes_a_namesake_in_the_working_directory(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(site, "named-tools", "checked_named", checked_named=EXPLODES)
    (tmp_path / "checked_named.py").write_text(EXPLODES)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    (found,) = about("named", check_installs())
    assert found.kind == "note"
    assert "in the working directory, 'checked_named.py', has the name of its own" in found.text
    monkeypatch.chdir(site.path)
    assert about("named", check_installs()) == []


def test_checkup_notes_a_name_that_two_offer() -> None:
    plugins = [
        PluginInfo("log", "twice", "first-tools", "1.2", "a"),
        PluginInfo("log", "twice", "second-tools", "2", "b"),
        PluginInfo("export", "twice", "second-tools", "2", "b"),
    ]
    (found,) = check_names(plugins)
    assert found.kind == "note"
    assert "offered by first-tools 1.2 and by second-tools 2" in found.text
    assert found.remedy == 'Write "first-tools:twice" or "second-tools:twice" in a config.'


def test_editable_folder_is_read_from_the_metadata(site: Any, tmp_path: Path) -> None:
    info = add(site, "edit-tools", "checked_edit")
    assert editable_folder("edit-tools") is None
    make_editable(info, tmp_path / "with a blank")
    assert editable_folder("edit-tools") == tmp_path / "with a blank"
    (info / "direct_url.json").write_text('{"url": "https://x/y.whl", "archive_info": {}}')
    assert editable_folder("edit-tools") is None
    assert editable_folder("surely-absent") is None
