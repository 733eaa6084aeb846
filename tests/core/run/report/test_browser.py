"""The page in a real browser: nothing leaves it, nothing complains, a phone can read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.run.report import read_history, render_page

MakeRun = Callable[..., Path]

SMALLEST_FONT = """
Math.min(...[...document.querySelectorAll('figure svg text')]
  .filter(text => text.getClientRects().length)
  .map(text => {
    const m = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(m.a, m.b);
  }))
"""


@pytest.fixture
def page(make_run: MakeRun, tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    runs = []
    for name, factor in (("one", 1.0), ("two<script>console.error(1)</script>", 2.0)):
        records: list[dict[str, Any]] = [
            {
                "kind": "step",
                "step": i,
                "time": i / 7,
                "items": 4.0,
                "metrics": {"train/loss": factor / i, "val/<img src=http://localhost:1/x>": 1.0},
            }
            for i in range(1, 30)
        ]
        run = make_run(name.replace("/", "_"), records)
        runs.append(read_history(run, name))
    path = tmp_path / "page.html"
    path.write_text(render_page("two runs", runs))
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390, 320])
def test_page_asks_for_nothing_and_fits(browser: Any, page: Path, width: int, theme: str) -> None:
    browser.open(page, width, theme)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[theme]
    ink = browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == browser.evaluate("getComputedStyle(document.body).color")
    if width >= 390:
        assert browser.evaluate(SMALLEST_FONT) >= 14


def test_page_switches_the_axis_with_the_keyboard_alone(browser: Any, page: Path) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('.over-time')].filter(x => x.offsetHeight).length"
    focused = "document.activeElement.id || document.activeElement.className"
    assert browser.evaluate(shown) == 0

    def press(key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            browser.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    seen = []
    while "axis-step" not in seen and len(seen) < 10:
        press("Tab", 9)
        seen.append(browser.evaluate(focused))
    assert seen[0] == "skip"
    assert seen[-1] == "axis-step"
    press("ArrowRight", 39)
    assert browser.evaluate(focused) == "axis-time"
    assert browser.evaluate(shown) > 0
    hidden = "[...document.querySelectorAll('.over-step')].filter(x => x.offsetHeight).length"
    assert browser.evaluate(hidden) == 0
