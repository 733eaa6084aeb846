"""Pictures of runs: one page that needs no network, and PNGs."""

from __future__ import annotations

from dovetail.run.report.history import RunHistory, read_history
from dovetail.run.report.page import render_page
from dovetail.run.report.writing import (
    PAGE,
    PICTURE,
    try_write_report,
    write_page,
    write_pictures,
    write_report,
)

__all__ = [
    "PAGE",
    "PICTURE",
    "RunHistory",
    "read_history",
    "render_page",
    "try_write_report",
    "write_page",
    "write_pictures",
    "write_report",
]
