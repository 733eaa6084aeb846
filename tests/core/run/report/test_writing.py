"""Pages and pictures of runs: made from their folders alone, safe to open, the same twice."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import MissingDependencyError, RunError
from dovetail.run import report
from dovetail.run.report import (
    PICTURE,
    read_history,
    render_page,
    try_to,
    write_page,
    write_picture,
    write_pictures,
    write_report,
)

MakeRun = Callable[..., Path]

EVIL = '</pre><script>alert(1)</script><img src="http://example.com/x">'
CONFIG = f"""
[run]
name = '''{EVIL}'''
[train]
lr = {{lr}}
batch_size = 4
[accumulate.exact]
steps = 3
"""


def records_of(num_steps: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"kind": "params", "time": 0.0, "params": {"run.name": EVIL}}]
    for i in range(1, num_steps + 1):
        metrics: dict[str, Any] = {"train/loss": 1 / i, "train/lr": 0.1, EVIL: 2.0}
        fields = {"items": 4.0, "wait_s": 0.1, "time": float(i)}
        records.append({"kind": "step", "step": i, "metrics": metrics, **fields})
    records[2]["metrics"]["train/loss"] = "NaN"
    records.append({"kind": "skip", "step": 3, "time": num_steps + 0.1, "loss": "NaN"})
    evaluation = {"kind": "evaluation", "step": num_steps, "time": num_steps + 0.5}
    records.append({**evaluation, "metrics": {"val/loss": 0.5}})
    records.append({"kind": "end", "status": "completed", "time": num_steps + 1.0})
    return records


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    pytest.importorskip("matplotlib")
    return make_run("one", records_of(20), CONFIG.format(lr=0.1))


def test_report_is_a_page_that_executes_and_loads_nothing(run: Path) -> None:
    page = write_report(run).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 3
    # What is linked lies in the page; names of XML are no addresses.
    assert set(re.findall(r"(?:src|href)=['\"](\S)", page)) <= {"#", "d"}
    assert "default-src 'none'" in page
    assert write_picture(run) == run / PICTURE
    assert (run / PICTURE).read_bytes().startswith(b"\x89PNG")
    for fact in ("completed", "best val/loss", "accumulate.exact.steps", "skipped windows"):
        assert fact in page


def test_report_has_no_name_twice_and_a_text_for_each_picture(run: Path) -> None:
    page = write_report(run).read_text()
    names = re.findall(r"\bid=['\"]([^'\"]+)", page)
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(names)
    assert page.count("<svg") == page.count('role="img" aria-label="') > 4
    assert "train/loss from 1 to 0.05; val/loss from 0.5 to 0.5" in page


def test_report_is_the_same_twice(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_report_of_several_runs_shows_what_differs(make_run: MakeRun, run: Path) -> None:
    other = make_run("two", records_of(10), CONFIG.format(lr=0.2))
    page = render_page("both", [read_history(run), read_history(other)])
    table = re.search(r"<caption>Settings that differ.*?</table>", page)
    assert table is not None
    assert re.findall(r"<tr><th scope='row'>([^<]+)", table[0]) == ["train.lr"]
    assert "var(--run-1)" in page
    assert page.count("<svg") == len(re.findall("<figure>", page)) * 2


def test_report_of_a_run_without_config_and_of_one_without_records(make_run: MakeRun) -> None:
    pytest.importorskip("matplotlib")
    bare = make_run("bare", [{"kind": "step", "step": 1, "metrics": {"loss": 1.0}}])
    assert "<svg" in write_report(bare).read_text()
    empty = make_run("empty", [])
    assert "There are no metrics yet." in write_report(empty).read_text()


def test_report_of_a_long_run_is_small_and_says_what_was_gathered(make_run: MakeRun) -> None:
    pytest.importorskip("matplotlib")
    page = render_page("long", [read_history(make_run("long", records_of(4000)))])
    assert len(page) < 600_000
    assert "Line: mean of up to 14 steps; band: their smallest and largest value." in page


def test_report_shows_the_manifest_of_the_bundle(run: Path) -> None:
    entry = {
        "files": ["a/model.onnx"],
        "cases": [{"sizes": {"batch": 3}, "max_error": 2e-7}],
        "limit": 1e-5,
        "export_seconds": 1.25,
    }
    failure = {"format": "pt2", "stage": "proof", "reason": "it <differs>"}
    manifest = {
        "artifacts": {"onnx": entry},
        "failures": [failure],
        "files": {"a/model.onnx": {"size_bytes": 1_500_000}},
    }
    (run / "bundle").mkdir()
    (run / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    (run / "bundle-step-000009").mkdir()
    (run / "bundle-step-000009" / "manifest.json").write_text("[]")
    page = write_report(run).read_text()
    cells = "".join(f"<td>{cell}</td>" for cell in ("2e-07", "1e-05", "batch 3", "1.2 s"))
    assert f"onnx</th>{cells}<td>1.50 MB</td>" in page
    assert "pt2 (proof): it &lt;differs&gt;" in page
    assert "The manifest of bundle-step-000009 cannot be read." in page


def test_pictures_are_one_png_per_panel(run: Path, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "new" / "png", [read_history(run)])
    names = [path.name for path in paths]
    assert names[0] == "loss.png"
    assert "throughput.png" in names
    assert "data-wait.png" in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert paths[0].parent == tmp_path / "new" / "png"


def test_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", "")


def test_report_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[report\]"'):
        write_report(run)
    assert try_to(write_report, run) is None
    assert try_to(write_picture, run) is None


def test_report_that_fails_warns_and_stops_nothing(run: Path) -> None:
    (run / report.PAGE).mkdir()  # a folder where the page should be
    with pytest.warns(UserWarning, match="cannot be written"):
        assert try_to(write_report, run) is None
