"""A log is followed while it grows, and noticed when a resume cuts it back."""

from __future__ import annotations

from pathlib import Path

from dovetail.run.tail import LogTail


def line(step: int) -> str:
    return f'{{"kind":"step","step":{step}}}\n'


def test_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    tail = LogTail(tmp_path)
    assert tail.read() == ([], False)
    log = tmp_path / "metrics.jsonl"
    log.write_text(line(1) + line(2)[:9])
    assert [r["step"] for r in tail.read()[0]] == [1]
    log.write_text(line(1) + line(2) + "damaged\n")
    assert [r["step"] for r in tail.read()[0]] == [2]
    assert tail.read() == ([], False)


def test_tail_begins_anew_when_the_log_was_cut_back_and_has_grown_past_it(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(map(line, (1, 2, 3))))
    tail = LogTail(tmp_path)
    tail.read()
    log.write_text("".join(map(line, (1, 2, 4, 5, 6))))
    records, is_anew = tail.read()
    assert [r["step"] for r in records] == [1, 2, 4, 5, 6]
    assert is_anew
    log.write_text(line(1))
    assert tail.read() == ([{"kind": "step", "step": 1}], True)
