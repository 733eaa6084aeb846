"""Pictures of a run: made from its log alone, safe to open, the same twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.errors import MissingDependencyError
from dovetail.run.report import PICTURE, read_curves, write_report


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    records = [
        {"kind": "step", "step": i, "metrics": {"train/loss": 1 / i, "train/lr": 0.1}}
        for i in range(1, 50)
    ]
    records.insert(3, {"kind": "skip", "step": 3, "loss": "NaN"})
    records.append({"kind": "evaluation", "step": 49, "metrics": {"val/loss": 0.5}})
    records.append({"kind": "evaluation", "step": 50, "metrics": {"val/loss": "NaN"}})
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "config.toml").write_text('[run]\nname = "</pre><script>alert(1)</script>"\n')
    return tmp_path


def test_read_curves_leaves_out_what_is_not_finite(finished_run: Path) -> None:
    curves, skips = read_curves(finished_run)
    assert len(curves["train/loss"].steps) == 49
    assert curves["val/loss"].values == [0.5]
    assert skips == [3]


def test_write_report_makes_a_page_that_loads_nothing(finished_run: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_report(finished_run, "a <b>", {"best val/loss": 0.5}).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &lt;b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert "src=" not in page
    assert page.count("<svg") == 2
    assert (finished_run / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_write_report_is_the_same_twice(finished_run: Path) -> None:
    pytest.importorskip("matplotlib")
    first = write_report(finished_run, "run", {}).read_bytes()
    assert write_report(finished_run, "run", {}).read_bytes() == first


def test_write_report_names_the_extra(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[report\]"'):
        write_report(finished_run, "run", {})
