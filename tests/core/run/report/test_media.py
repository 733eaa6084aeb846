"""Figures, texts and histograms of a run stand in its page, and nothing from elsewhere does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.run.report import media as media_module
from dovetail.run.report import read_history
from dovetail.run.report.media import media_part

MakeRun = Callable[..., Path]

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def record(kind: str, name: str, file: str, step: int = 1) -> dict[str, Any]:
    return {"kind": kind, "name": name, "file": file, "step": step, "time": 1.0}


@pytest.fixture
def embed(make_run: MakeRun) -> Callable[..., str]:
    pytest.importorskip("matplotlib")

    def make(files: dict[str, bytes], *records: dict[str, Any]) -> str:
        run = make_run("one", list(records))
        for name, data in files.items():
            path = run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return media_part([read_history(run)])

    return make


def test_media_embeds_the_newest_of_each_name(embed: Callable[..., str]) -> None:
    part = embed(
        {"a.png": b"old", "b.png": PNG, "t.txt": b"1 < 2"},
        record("figure", "roc", "a.png"),
        record("figure", "roc", "b.png", step=7),
        record("text", "sample <x>", "t.txt"),
        record("artifact", "bundle", "bundle"),
    )
    assert part.count("<img") == 1
    assert base64.b64encode(PNG).decode() in part
    assert "roc, step 7 (1 earlier)" in part
    assert "sample &lt;x&gt;" in part
    assert "1 &lt; 2" in part
    assert "Artifact bundle" in part


def test_media_draws_a_histogram(embed: Callable[..., str]) -> None:
    data = json.dumps({"counts": [1, 3], "edges": [0, 1, 2]}).encode()
    part = embed({"h.json": data}, record("histogram", "weights", "h.json"))
    assert 'aria-label="Histogram weights, step 1: 4 values from 0 to 2"' in part


@pytest.mark.parametrize("file", ["../secret.txt", "link.txt", "", "\0", "missing.txt"])
def test_media_shows_nothing_that_lies_outside_the_run(make_run: MakeRun, file: str) -> None:
    run = make_run("one", [record("text", "evil", file)])
    secret = run.parent / "secret.txt"
    secret.write_text("hidden words")
    (run / "link.txt").symlink_to(secret)
    part = media_part([read_history(run)])
    assert "hidden words" not in part
    assert "is not in the run's folder" in part


def test_media_that_is_damaged_is_said(embed: Callable[..., str]) -> None:
    part = embed(
        {"a.png": b"<svg onload=alert(1)>", "h.json": b"{}", "e.json": b'{"counts":[],"edges":[]}'},
        record("figure", "a", "a.png"),
        record("histogram", "h", "h.json"),
        record("histogram", "e", "e.json"),
    )
    assert part.count("cannot be shown") == 3
    assert "<svg" not in part


def test_media_beyond_the_limit_is_counted(
    embed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "LIMIT_BYTES", len(PNG) + 10)
    part = embed(
        {"a.png": PNG, "b.png": PNG},
        record("figure", "a", "a.png"),
        record("figure", "b", "b.png"),
    )
    assert part.count("<img") == 1
    assert "1 more are not embedded" in part
