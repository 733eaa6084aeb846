"""The command line: one file per command, and the only place that prints or exits."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        args: The arguments; those of the process without it.
    """
    from dovetail.cli._group import cli

    try:
        cli.main(args, prog_name="dovetail")
    except SystemExit as err:
        if args is None and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            _end_at_once(err.code)
        raise


def _end_at_once(status: object) -> NoReturn:
    """End a process that a launcher started, without Python's own end.

    Threads of gloo outlive the process group of a model that FSDP2 divides, and abort a process in
    whose end they are met, now and then (torch 2.15): a run that went well would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)
