"""Durations and times in words."""

from __future__ import annotations

import pytest

from dovetail.run.spelling import spell_duration, spell_time


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, None),
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (185.2, "3 min 5 s"),
        (3661, "1 h 1 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_duration_has_two_units(seconds: float | None, words: str | None) -> None:
    assert spell_duration(seconds) == words


def test_time_is_utc_and_nothing_where_it_is_none() -> None:
    assert spell_time(0.0) == "1970-01-01 00:00"
    assert spell_time(None) is None
    assert spell_time(1e300) is None
