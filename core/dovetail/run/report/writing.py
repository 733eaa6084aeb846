"""Writes reports and pictures of runs into files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dovetail.errors import MissingDependencyError, RunError, build_message
from dovetail.run.report.drawing import draw_panel, draw_sheet
from dovetail.run.report.history import PICTURE, RunHistory, read_history
from dovetail.run.report.page import render_page
from dovetail.run.report.panels import DERIVED, build_panels
from dovetail.run.report.themes import applied, paper_theme

PAGE = "report.html"
_SHEET_PANELS = 12


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder, from what the folder tells.

    Returns:
        The page. It needs no network and follows the reader's light or dark theme.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        RunError: A file cannot be written.
    """
    runs = [read_history(run_dir)]
    path = run_dir / PAGE
    write_page(path, render_page(runs[0].summary.name, runs))
    return path


def write_picture(run_dir: Path) -> Path:
    """Write `report.png` into a run's folder: its curves on one sheet.

    Returns:
        The picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    runs, path = [read_history(run_dir)], run_dir / PICTURE
    theme = paper_theme(1)
    with applied(theme):
        panels = build_panels(runs)[0][:_SHEET_PANELS]
        draw_sheet(panels, runs, "step", theme).savefig(path, dpi=150)
    return path


def try_to(write: Callable[[Path], Path], run_dir: Path) -> Path | None:
    """Write the page or the picture of a run; no failure of it is one of the run.

    Args:
        write: `write_report` or `write_picture`.
        run_dir: The run's folder.

    Returns:
        The file, or `None` where matplotlib is not installed or it failed, with a warning.
    """
    try:
        return write(run_dir)
    except MissingDependencyError:
        return None
    except Exception as err:
        found = f"cannot be written: {type(err).__name__}: {err}"
        warnings.warn(build_message(f"report of run {str(run_dir)!r}", found), stacklevel=2)
        return None


def write_page(path: Path, page: str) -> None:
    """Write a page; whoever looks at an earlier one has it until this one is whole.

    Raises:
        RunError: It cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as err:
        found = f"cannot be written: {err.strerror}"
        hint = "Choose another file: --output FILE."
        raise RunError(build_message(f"report {str(path)!r}", found, action=hint)) from err


def write_pictures(directory: Path, runs: Sequence[RunHistory]) -> list[Path]:
    """Write one PNG per panel, over optimizer steps, as papers want them.

    Args:
        directory: Where to; it is made.
        runs: The runs.

    Returns:
        The files, 3.5 inches wide at 300 dots per inch, light, with a legend.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        RunError: A file cannot be written.
    """
    theme = paper_theme(len(runs))
    paths: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with applied(theme):
            for panel in build_panels(runs)[0]:
                figure = draw_panel(panel, runs, "step", theme)
                figure.axes[0].set_ylabel(panel.title)
                name = (
                    re.sub(r"[^a-z0-9]+", "-", panel.key.removeprefix(DERIVED).lower()).strip("-")
                    or "panel"
                )
                path = directory / f"{name}.png"
                number = 2
                while path in paths:
                    path = directory / f"{name}-{number}.png"
                    number += 1
                # Axis labels may be wider than the margins of a page.
                figure.savefig(path, dpi=300, bbox_inches="tight", metadata={"Software": None})
                paths.append(path)
    except OSError as err:
        found = f"cannot be written: {err.strerror}"
        hint = "Choose another folder: --png DIR."
        raise RunError(build_message(f"pictures {str(directory)!r}", found, action=hint)) from err
    return paths
