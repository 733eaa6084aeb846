"""`dovetail verify`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import FAILED, debug_option

if TYPE_CHECKING:
    from dovetail.bundle.proof import FormatVerification

_HEADER = ("FORMAT", "BATCH SIZES", "MAX ERROR", "LIMIT", "SECONDS", "PROOF")
_WIDTH = 80


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--format", "formats", multiple=True, metavar="NAME", help="Only this one; may be repeated."
)
@debug_option
def verify(bundle: Path, formats: tuple[str, ...]) -> None:
    """Run a bundle's artifacts and compare the outputs.

    Every file of BUNDLE must be there and unchanged. Each artifact then runs in its own runtime,
    in a process of its own, and must give the outputs that the trained model gave.

    Some formats carry code that runs when they are opened: verify a bundle only if you would
    install a package from the same source.
    """
    from dovetail.bundle.proof import verify_bundle

    report = verify_bundle(bundle, formats or None)
    for line in format_columns([_row(f) for f in report.formats], _HEADER):
        say(line)
    for found in report.formats:
        if found.problem is not None:
            say()
            text = f"{found.format}: {' '.join(found.problem.split())}"
            for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  "):
                say(line)
    say()
    say(f"{'verified' if report.is_ok else 'NOT verified'}: {report.path}")
    if not report.is_ok:
        raise click.exceptions.Exit(FAILED)


def _row(found: FormatVerification) -> tuple[str, ...]:
    return (
        found.format,
        ", ".join(map(str, found.batch_sizes)) or "-",
        "-" if found.max_error is None else f"{found.max_error:.1e}",
        f"{found.limit:.0e}",
        f"{found.seconds:.1f}",
        "ok" if found.is_ok else "FAILED",
    )
