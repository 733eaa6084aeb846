"""The command line: one file per command, and the only place that prints or exits."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        args: The arguments; those of the process without it.
    """
    from dovetail.cli._group import cli

    cli.main(args, prog_name="dovetail")
