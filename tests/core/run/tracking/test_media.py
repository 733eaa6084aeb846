from __future__ import annotations

import json
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.errors import ConfigError
from dovetail.run.tracking.media import (
    count_values,
    figure_writer,
    histogram_writer,
    keep_artifact,
    safe_name,
    text_writer,
    write_media,
)

PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"


# --- file names


@pytest.mark.parametrize("name", ["confusion", "val_loss", "layer.3", "a-b", "x" * 64])
def test_a_plain_name_is_its_own_file_name(name: str) -> None:
    assert safe_name(name) == name


HOSTILE = [
    "Confusion", "CONFUSION", "a/b", "a_b/", "../../etc/passwd", "..", ".", ".hidden", "/", "\\",
    "con", "nul.txt", "com1", "a:b", "a b", "a\x00b", "a\nb", "ü", "u\u0308", "名前", "x" * 65,
    "x" * 500, "trailing.", "\ud800", "confusion-0123abcd", "%2e%2e", "~", "-", "🙂",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_name_becomes_one_that_every_file_system_takes(tmp_path: Path, name: str) -> None:
    found = safe_name(name)
    assert found.isascii()
    assert len(found) <= 80
    assert not set(found) & set('<>:"/\\|?* .~%\x00\n')
    assert found.lower() not in ("con", "nul", "com1")
    (tmp_path / found).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [found]


def test_names_that_differ_have_file_names_that_differ_in_more_than_case() -> None:
    names = [*HOSTILE, "confusion", "a_b", "u", "x" * 64, *map(safe_name, HOSTILE)]
    assert len({safe_name(name).lower() for name in names}) == len(names)


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_two_names_meet(one: str, other: str) -> None:
    assert (safe_name(one).lower() == safe_name(other).lower()) is (one == other)


# --- files


def test_a_file_lies_in_the_folder_of_its_name_and_step(tmp_path: Path) -> None:
    place = write_media(tmp_path, "confusion", 12, ".png", lambda path: path.write_bytes(PNG))
    assert place == "media/confusion/step-00000012.png"
    assert (tmp_path / place).read_bytes() == PNG


def test_a_repeated_step_replaces_its_file(tmp_path: Path) -> None:
    for text in ("first", "second"):
        place = write_media(tmp_path, "note", 3, ".txt", text_writer("note", text))
    assert [p.name for p in (tmp_path / "media/note").iterdir()] == ["step-00000003.txt"]
    assert (tmp_path / place).read_text() == "second"


def test_a_file_that_cannot_be_written_whole_leaves_the_earlier_one(tmp_path: Path) -> None:
    place = write_media(tmp_path, "note", 3, ".txt", text_writer("note", "first"))

    def fail(path: Path) -> None:
        path.write_text("hal")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_media(tmp_path, "note", 3, ".txt", fail)
    assert [p.name for p in (tmp_path / "media/note").iterdir()] == ["step-00000003.txt"]
    assert (tmp_path / place).read_text() == "first"


def test_a_text_is_utf8_as_it_is(tmp_path: Path) -> None:
    text = "ein Satz,\r\nzwei Zeilen \ud800 名前\n"
    place = write_media(tmp_path, "note", 0, ".txt", text_writer("note", text))
    assert (tmp_path / place).read_bytes().decode() == text.replace("\ud800", "\\ud800")


def test_a_text_must_be_one() -> None:
    with pytest.raises(ConfigError, match="log_text 'note': got a int; expected a string"):
        text_writer("note", 3)


# --- figures


def test_a_matplotlib_figure_becomes_a_png(tmp_path: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    place = write_media(tmp_path, "plot", 1, ".png", figure_writer("plot", figure))
    assert (tmp_path / place).read_bytes().startswith(PNG[:8])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P"])
def test_a_pillow_image_becomes_a_png(tmp_path: Path, mode: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new(mode, (3, 2))
    place = write_media(tmp_path, "image", 1, ".png", figure_writer("image", image))
    with image_module.open(tmp_path / place) as found:
        assert (found.format, found.size) == ("PNG", (3, 2))


def test_a_png_file_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "drawn.png"
    source.write_bytes(PNG)
    place = write_media(tmp_path, "plot", 1, ".png", figure_writer("plot", str(source)))
    source.unlink()
    assert (tmp_path / place).read_bytes() == PNG


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (np.zeros((3, 3)), "got a ndarray; expected a matplotlib figure, a Pillow image or"),
        (None, "got a NoneType"),
        ("absent.png", "'absent.png' cannot be read: No such file"),
        (__file__, "is no PNG file"),
    ],
)
def test_what_is_no_figure_is_refused(figure: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        figure_writer("plot", figure)


# --- histograms


def drawn(tmp_path: Path, values: Any, bins: int) -> dict[str, Any]:
    place = write_media(tmp_path, "h", 1, ".json", histogram_writer("h", values, bins))
    found: dict[str, Any] = json.loads((tmp_path / place).read_text())
    return found


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 1, 4],
        np.array([[0, 1], [1, 4]], dtype=np.uint8),
        torch.tensor([[0.0, 1.0, 1.0, 4.0]], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([0, 1, 1, 4]),
        (0.0, 1.0, np.float32(1), 4),
    ],
)
def test_a_histogram_counts_values_of_any_shape(tmp_path: Path, values: Any) -> None:
    assert drawn(tmp_path, values, 4) == {
        "counts": [1, 2, 0, 1],
        "edges": [0, 1, 2, 3, 4],
        "num_non_finite": 0,
    }


def test_a_histogram_leaves_out_what_is_not_finite_and_says_how_much(tmp_path: Path) -> None:
    found = drawn(tmp_path, [1.0, np.nan, np.inf, 2.0, -np.inf], 2)
    assert found == {"counts": [1, 1], "edges": [1, 1.5, 2], "num_non_finite": 3}


@pytest.mark.parametrize("values", [[], [np.nan], torch.zeros(0, 3)])
def test_a_histogram_of_nothing_is_empty(tmp_path: Path, values: Any) -> None:
    found = drawn(tmp_path, values, 2)
    assert (found["counts"], found["edges"]) == ([0, 0], [0, 0.5, 1])


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=1, max_size=30), st.integers(1, 70))
def test_a_histogram_holds_every_finite_value_between_growing_edges(
    values: list[float], bins: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts, edges, num_left_out = count_values(np.array(values), bins)
    assert (sum(counts), len(counts), len(edges), num_left_out) == (len(values), bins, bins + 1, 0)
    assert all(low < high for low, high in pairwise(edges))
    assert np.isfinite(edges).all()


@pytest.mark.parametrize("values", [[-1.0, 5e-324], [-5e-324, 1.0], [0.0, 5e-324]])
def test_a_histogram_holds_the_smallest_floats_at_its_ends(values: list[float]) -> None:
    counts, _, _ = count_values(np.array(values), 4)
    assert sum(counts) == 2


def test_a_histogram_is_numpys_own_where_that_has_one() -> None:
    values = np.random.default_rng(0).normal(size=500)
    counts, edges, _ = count_values(values, 16)
    expected, expected_edges = np.histogram(values, bins=16)
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-12)
    assert counts == expected.tolist()


@pytest.mark.parametrize("bins", [0, -1, 2.5, True, "auto"])
def test_bins_must_be_a_count(bins: Any) -> None:
    with pytest.raises(ConfigError, match=r"bins is .*; expected an integer >= 1"):
        histogram_writer("h", [1.0], bins)


@pytest.mark.parametrize("values", ["text", ["a"], None, [1j], [[1], [1, 2]], torch.tensor([1j])])
def test_a_histogram_of_what_are_no_numbers_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"log_histogram 'h': .*expected real numbers"):
        histogram_writer("h", values, 4)


# --- artifacts


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_an_artifact_in_the_run_is_referred_to(run_dir: Path) -> None:
    (run_dir / "bundle").mkdir()
    (run_dir / "bundle/file").write_text("here")
    assert keep_artifact(run_dir, "bundle", 3, run_dir / "bundle") == "bundle"
    assert keep_artifact(run_dir, "one", 3, run_dir / "x/../bundle/file") == "bundle/file"
    assert [path.name for path in run_dir.iterdir()] == ["bundle"]


def test_an_artifact_from_outside_is_copied_for_each_step(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "table.csv"
    for step in (1, 2):
        source.write_text(f"of step {step}")
        assert keep_artifact(run_dir, "My table", step, source).endswith(f"{step}/table.csv")
    source.unlink()
    (folder,) = (run_dir / "artifacts").iterdir()
    assert folder.name == safe_name("My table")
    found = {path.parent.name: path.read_text() for path in folder.rglob("*.csv")}
    assert found == {"step-00000001": "of step 1", "step-00000002": "of step 2"}


def test_a_folder_from_outside_is_copied_whole_and_replaced_when_done_again(
    run_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "folder"
    (source / "inner").mkdir(parents=True)
    (source / "inner/old").write_text("old")
    keep_artifact(run_dir, "files", 1, source)
    (source / "inner/old").rename(source / "inner/new")
    place = keep_artifact(run_dir, "files", 1, source)
    assert place == "artifacts/files/step-00000001/folder"
    files = [p for p in (run_dir / "artifacts").rglob("*") if p.is_file()]
    assert files == [run_dir / place / "inner/new"]


def test_an_artifact_that_holds_the_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    for path in (tmp_path, run_dir):
        with pytest.raises(ConfigError, match="holds the run's own folder"):
            keep_artifact(run_dir, "all", 1, path)


def test_an_artifact_that_is_not_there_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; expected a file or a folder"):
        keep_artifact(run_dir, "file", 1, "absent")
    with pytest.raises(ConfigError, match="got a NoneType; expected a path"):
        keep_artifact(run_dir, "file", 1, None)
    assert list(run_dir.iterdir()) == []


def test_an_artifact_that_cannot_be_copied_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    (source / "whole").write_text("copied first")
    os.symlink(tmp_path / "nowhere", source / "zz-dangling")
    with pytest.raises(OSError, match="zz-dangling"):
        keep_artifact(run_dir, "files", 1, source)
    assert not list((run_dir / "artifacts").rglob("*step*"))
