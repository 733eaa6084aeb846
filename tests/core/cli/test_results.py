"""What a run has left behind, as lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from dovetail.bundle.report import ArtifactReport, BundleReport, FormatFailure
from dovetail.cli._results import describe_paths, describe_result, spell_bytes
from dovetail.pipeline import TrainingResult

RUN = Path("runs/digits/1")

BUNDLE = BundleReport(
    RUN / "bundle",
    (ArtifactReport("onnx", 1_234_567, 2.9e-7, (1, 2, 8), 4.25),),
    (
        FormatFailure(
            "torchscript",
            "export",
            "the model uses an operator that the format has no name for, and says so at length.",
            "Choose another format.",
        ),
    ),
)


def make_result(bundle: BundleReport | None = None) -> TrainingResult:
    return TrainingResult(
        status="completed",
        run_dir=RUN,
        final_metrics={"train/loss": 0.25, "val/loss": float("nan"), "train/items": 8.0},
        best_metrics={"train/loss": 0.125},
        best_checkpoint=RUN / "checkpoints" / "step-000012",
        last_checkpoint=RUN / "checkpoints" / "step-000016",
        num_steps=16,
        duration_s=75.0,
        model=nn.Identity(),
        bundle=bundle,
    )


def test_result_tells_metrics_last_and_best() -> None:
    assert list(describe_result(make_result())) == [
        "",
        "completed: 16 steps in 1 min 15 s",
        "",
        "METRIC      LAST  BEST CHECKPOINT",
        "train/loss  0.25  0.125",
        "val/loss    nan   -",
    ]


def test_result_tells_each_format_and_why_one_failed() -> None:
    lines = list(describe_result(make_result(BUNDLE)))
    assert lines[7:] == [
        "FORMAT       SIZE     MAX ERROR  PROVEN AT BATCH SIZES  SECONDS",
        "onnx         1.23 MB  2.9e-07    1, 2, 8                4.2",
        "torchscript  -        failed     -                      -",
        "",
        "torchscript failed at its export: the model uses an operator that the format has",
        "  no name for, and says so at length. Choose another format.",
    ]
    assert max(map(len, lines)) <= 80


def test_paths_name_run_best_checkpoint_and_bundle() -> None:
    assert list(describe_paths(make_result(BUNDLE))) == [
        "run     runs/digits/1",
        "best    runs/digits/1/checkpoints/step-000012",
        "bundle  runs/digits/1/bundle",
    ]


def test_paths_tell_how_trackers_get_what_they_lack() -> None:
    parked = {"wandb": "OSError: no route", "mlflow": "late"}
    result = replace(make_result(), parked_trackers=parked)
    assert list(describe_paths(result))[-2:] == [
        "trackers that lack records: wandb, mlflow",
        "hand them over with: dovetail log sync runs/digits/1",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(812, "812 B"), (46_800_000, "46.8 MB"), (999, "999 B"), (1_230, "1.23 kB"), (2e9, "2 GB")],
)
def test_bytes_are_told_as_people_say_them(size: float, text: str) -> None:
    assert spell_bytes(size) == text
