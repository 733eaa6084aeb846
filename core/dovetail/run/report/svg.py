"""Turns figures into SVG that stands in a page among others."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PATH = re.compile(r'(?<= d=")[^"]*')
_LONG_NUMBER = re.compile(r"(\d+\.\d\d)\d+")
_ID = re.compile(r'(?<= id=")([^"]+)(?=")')
_REFERENCE = re.compile(r'(?<=url\(#)[^)]+(?=\))|(?<=href="#)[^"]+')
_FONTS = re.compile(r"font-family: [^;\"]*;? ?")  # the page has its own
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')


def to_svg(figure: Figure, prefix: str, label: str, colors: Mapping[str, str]) -> str:
    """Return a figure as an inline SVG element.

    Args:
        figure: The figure.
        prefix: Makes its names different from those of the page's other pictures.
        label: What is to be seen, for those who cannot.
        colors: Colours that the page's style sheet decides, by the one they were drawn in.
    """
    buffer = io.StringIO()
    # Without a date two reports of one run are the same bytes.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _PATH.sub(lambda found: _LONG_NUMBER.sub(r"\1", found[0]).replace("\n", ""), text)
    text = _FONTS.sub("", text)
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(lambda found: f"{prefix}-{found[1]}" if found[1] in used else "", text)
    text = text.replace(' id=""', "")
    text = _REFERENCE.sub(lambda found: f"{prefix}-{found[0]}", text)
    for color, variable in colors.items():
        text = text.replace(color, variable)
    head, _, rest = text.partition(">")
    head = _SIZE.sub("", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'
