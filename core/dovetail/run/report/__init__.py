"""Pictures of runs: one page that needs no network, and PNGs."""

from __future__ import annotations

from dovetail.run.report.history import PICTURE, RunHistory, read_history
from dovetail.run.report.page import render_page
from dovetail.run.report.writing import (
    PAGE,
    try_to,
    write_page,
    write_picture,
    write_pictures,
    write_report,
)

__all__ = [
    "PAGE",
    "PICTURE",
    "RunHistory",
    "read_history",
    "render_page",
    "try_to",
    "write_page",
    "write_picture",
    "write_pictures",
    "write_report",
]
