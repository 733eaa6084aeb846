"""What the pages on plugins show is what `dovetail plugins new` writes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from dovetail.registry import Role
from dovetail.scaffold import write_plugin
from dovetail.testing import CollatorSuite

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = sorted([*HOW_TO.glob("write-a-*.md"), *HOW_TO.glob("write-an-*.md")])
GENERAL = "write-a-plugin.md"


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def new_command(page: Path) -> tuple[str, Role]:
    """Return name and hook of the `dovetail plugins new` on a page."""
    (first, *_) = blocks(page, "console")
    found = re.search(r"dovetail plugins new (\S+) --hook (\S+)", first)
    assert found is not None, f"{page.name} does not begin with dovetail plugins new"
    return found[1], found[2]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != GENERAL], ids=lambda page: page.name
)
def test_page_shows_what_the_scaffold_writes(page: Path, tmp_path: Path) -> None:
    name, hook = new_command(page)
    folder = write_plugin(name, hook, tmp_path)
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    shown = blocks(page, "python")
    assert len(shown) >= 2
    for block in shown:
        assert any(block in source for source in sources), f"{page.name} shows\n{block}"


def test_every_hook_has_a_page() -> None:
    hooks = [new_command(page)[1] for page in PAGES if page.name != GENERAL]
    assert sorted(hooks) == sorted(get_args(Role))


def test_general_page_is_a_plugin_that_passes_its_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, *_ = blocks(HOW_TO / GENERAL, "python")
    (tmp_path / "shown_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))  # where the suite's worker looks too
    CollatorSuite.check(
        plugin=importlib.import_module("shown_plugin"),
        samples=[{"features": torch.rand(3), "labels": index % 2} for index in range(4)],
        options={"factor": 2.0},
    )
