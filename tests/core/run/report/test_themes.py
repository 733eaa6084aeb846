"""Colours that can be told from the paper, and from each other."""

from __future__ import annotations

import pytest

from dovetail.run.report import themes


def luminance(color: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("colors", "ink", "paper"),
    [
        (themes.LIGHT, themes.LIGHT_INK, themes.LIGHT_PAPER),
        (themes.DARK, themes.DARK_INK, themes.DARK_PAPER),
    ],
)
def test_colors_stand_out_from_the_paper(colors: tuple[str, ...], ink: str, paper: str) -> None:
    assert contrast(ink, paper) >= 7
    assert min(contrast(color, paper) for color in colors) >= 3


def test_run_colors_differ_for_any_number_of_runs() -> None:
    pytest.importorskip("matplotlib")
    for number in (1, 8, 9, 40):
        assert len(set(themes.run_colors(number, themes.LIGHT))) == number
