"""Which curves share a panel, and in which order the panels come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.run.report import read_history
from dovetail.run.report.panels import MAX_PANELS, build_panels

MakeRun = Callable[..., Path]


def test_panels_hold_splits_and_runs_of_one_quantity(make_run: MakeRun) -> None:
    metrics = {
        "train/lr": 0.1,
        "train/grad_norm": 1.0,
        "system/memory_bytes": 2.0**30,
        "train/loss": 1.0,
        "val/accuracy": 0.5,
        "val/loss": 1.0,
        "plain": 1.0,
        "system/loss": 7.0,
    }
    records = [
        {"kind": "step", "step": i, "time": float(i), "items": 2, "wait_s": 0.1, "metrics": metrics}
        for i in (1, 2)
    ]
    runs = [read_history(make_run(name, records)) for name in ("a", "b")]
    panels, left_out = build_panels(runs)
    titles = [panel.title for panel in panels]
    assert titles == [
        "Loss",
        "Accuracy",
        "Plain",
        "Learning rate",
        "Gradient norm",
        "Throughput (items/s)",
        "Waiting for data (share of time)",
        "Loss",
        "Memory (GiB)",
    ]
    assert [(x.run, x.split) for x in panels[0].lines] == [
        (0, "train"),
        (0, "val"),
        (1, "train"),
        (1, "val"),
    ]
    assert panels[-1].lines[0].scale == 2.0**-30
    assert left_out == []


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("system/gpu_memory_peak_gib", "GPU memory peak (GiB)"),
        ("system/cpu_percent", "CPU (%)"),
        ("system/model_tflops_per_s", "Model TFLOPs per second"),
        ("system/items_per_s", "Items per second"),
        ("my_own", "My own"),
        ("mAP", "mAP"),
    ],
)
def test_panel_title_is_the_name_in_words_with_its_unit(
    make_run: MakeRun, name: str, title: str
) -> None:
    run = read_history(make_run("a", [{"kind": "system", "step": 1, "metrics": {name: 1.0}}]))
    assert [panel.title for panel in build_panels([run])[0]] == [title]


def test_panels_of_thousands_of_names_are_bounded_and_the_rest_is_named(make_run: MakeRun) -> None:
    metrics = {f"m{number:04d}": 1.0 for number in range(2000)}
    run = read_history(make_run("a", [{"kind": "step", "step": 1, "metrics": metrics}]))
    panels, left_out = build_panels([run])
    assert len(panels) == MAX_PANELS
    assert left_out[0] == f"m{MAX_PANELS:04d}"
    assert len(left_out) == 2000 - MAX_PANELS
