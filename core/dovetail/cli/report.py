"""`dovetail report`: the curves of one or several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from dovetail.cli._console import complain, say
from dovetail.cli._errors import debug_option
from dovetail.cli._runs import dir_option, label_runs, resolve_runs

SEVERAL = "runs-report.html"
"""Page of several runs, in the current folder."""


@click.command()
@click.argument("wanted", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page; without it report.html in the folder of a single run, "
    f"{SEVERAL} in the current folder for several.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write a PNG per panel into a folder, 300 dots per inch, for papers.",
)
@dir_option
@debug_option
def report(wanted: Sequence[str], output: Path | None, png: Path | None, root: Path) -> None:
    """Draw the curves of runs into one page.

    The page stands alone: it loads nothing, and shows results, curves over steps and over time,
    settings and what differs between them, the bundle and what was logged. Several runs lie over
    each other. A run may still be going on.

    RUN is a run's folder, its id, or "latest".
    """
    from dovetail.cli._screen import warnings_as_lines
    from dovetail.run.report import PAGE, read_history, render_page, write_page, write_pictures

    paths = resolve_runs(wanted, root)
    with warnings_as_lines(complain):
        labels = label_runs(paths)
        runs = [read_history(path, label) for path, label in zip(paths, labels, strict=True)]
    names = list(dict.fromkeys(run.summary.name for run in runs))
    if output is None:
        output = paths[0] / PAGE if len(paths) == 1 else Path(SEVERAL)
    write_page(output, render_page(", ".join(names), runs))
    say(f"report  {output}")
    if png is not None:
        pictures = write_pictures(png, runs)
        say(f"png     {len(pictures)} in {png}")
