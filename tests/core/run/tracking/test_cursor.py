from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dovetail.run.tracking.cursor import Cursor, Position, list_cursors, rewind_cursors

# What may stand in the file of a cursor after a crash of the machine, or of an editor.
DAMAGED = [
    "",
    "x",
    "\x00\x00\x00",
    "ü",
    "17",
    "null",
    "[17]",
    '"17"',
    '{"offset": "17"}',
    '{"offset": null}',
    '{"offset": 1.5}',
    '{"offset": -5}',
    '{"offset": 17, "colour": "red"}',
    '{"offset": 17, "is_clean"',
]


@pytest.mark.parametrize(
    "position", [Position(), Position(17), Position(3, is_clean=True), Position(5, False, True)]
)
def test_cursor_keeps_a_position(tmp_path: Path, position: Position) -> None:
    assert not Cursor(tmp_path, "mine").exists()
    Cursor(tmp_path, "mine").write(position)
    assert Cursor(tmp_path, "mine").exists()
    assert Cursor(tmp_path, "mine").read() == position


def test_cursor_that_is_not_there_is_at_the_beginning(tmp_path: Path) -> None:
    assert Cursor(tmp_path, "mine").read() == Position(0, is_clean=False, needs_rewind=False)


@pytest.mark.parametrize("text", DAMAGED)
def test_cursor_that_is_damaged_is_at_the_beginning(tmp_path: Path, text: str) -> None:
    (tmp_path / ".mine.cursor").write_text(text, encoding="utf-8")
    assert Cursor(tmp_path, "mine").read() == Position()
    rewind_cursors(tmp_path, 10)
    assert Cursor(tmp_path, "mine").read() == Position(0, needs_rewind=True)


def test_cursor_keeps_the_old_position_on_a_full_disk(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    cursor = Cursor(tmp_path, "mine")
    cursor.write(Position(17))
    with full_disk(4):
        cursor.write(Position(18))
    assert cursor.read() == Position(17)


def test_cursors_are_told_apart_by_name(tmp_path: Path) -> None:
    Cursor(tmp_path, "wandb").write(Position(1))
    Cursor(tmp_path, "other-dist:wandb").write(Position(2))
    assert Cursor(tmp_path, "wandb").read().offset == 1
    assert list_cursors(tmp_path) == ["other-dist-wandb", "wandb"]


def test_half_written_cursors_and_other_files_are_no_cursors(tmp_path: Path) -> None:
    for name in (".mine.cursor.partial", "metrics.jsonl", ".run.lock", "my.cursor"):
        (tmp_path / name).touch()
    assert list_cursors(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Position(90), Position(50, needs_rewind=True)),
        (Position(90, is_clean=True), Position(50, needs_rewind=True)),
        # It may have taken more than it noted.
        (Position(30), Position(30, needs_rewind=True)),
        (Position(30, needs_rewind=True), Position(30, needs_rewind=True)),
        # It took nothing that is cut away.
        (Position(50, is_clean=True), Position(50, is_clean=True)),
        (Position(30, is_clean=True), Position(30, is_clean=True)),
    ],
)
def test_cursors_of_a_log_that_is_cut_ask_for_a_rewind(
    tmp_path: Path, before: Position, after: Position
) -> None:
    for name in ("one", "two"):
        Cursor(tmp_path, name).write(before)
    rewind_cursors(tmp_path, 50)
    assert [Cursor(tmp_path, name).read() for name in ("one", "two")] == [after, after]
