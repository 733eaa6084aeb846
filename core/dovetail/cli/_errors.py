"""The one place where an exception becomes a message and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from dovetail.cli._console import complain, discard_output, wrap_text

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130

_DEBUG_VARIABLE = "DOVETAIL_DEBUG"

debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    help=f"Show the traceback of every error (also {_DEBUG_VARIABLE}=1).",
)
"""Accepted before and after the command; `run_guarded` looks for it."""


def run_guarded(work: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run a command and return its exit status.

    Args:
        work: The command; what it returns does not matter.
        arguments: What the user typed, to see whether tracebacks are wanted.
    """
    try:
        work()
        return 0
    except click.exceptions.Exit as err:
        return err.exit_code
    except click.ClickException as err:
        return _report_usage(err)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        return INTERRUPTED
    except Exception as err:
        if isinstance(err, BrokenPipeError) and _is_from_click(err):
            discard_output()
            return 0
        return _report(err, is_debug=_wants_traceback(arguments))


def _wants_traceback(arguments: Sequence[str]) -> bool:
    return "--debug" in arguments or os.environ.get(_DEBUG_VARIABLE, "") not in ("", "0")


def _is_from_click(err: Exception) -> bool:
    """Return whether it was click that could not print a help text or the version.

    A pipe that broke in the user's code is another matter.
    """
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"].startswith("click.")


def _report_usage(err: click.ClickException) -> int:
    context = getattr(err, "ctx", None)
    if context is not None:
        complain(context.get_usage())
    message = err.format_message()
    if context is not None:
        message += f" Help: {context.command_path} --help"
    _complain_error(message)
    return err.exit_code


def _report(err: Exception, *, is_debug: bool) -> int:
    from dovetail.errors import ConfigError, DovetailError

    if isinstance(err, DovetailError):
        if is_debug:
            complain(_format_traceback(err))
        _complain_error(str(err))
        return BAD_USAGE if isinstance(err, ConfigError) else FAILED
    complain(_format_traceback(err))
    # A model's or a data set's own mistake ends up here too.
    _complain_error(
        f"unexpected {type(err).__name__}. If it does not come from your own code, report the "
        "traceback above with the output of `dovetail version`."
    )
    return FAILED


def _format_traceback(err: Exception) -> str:
    import traceback  # a command that does not fail starts faster without

    return "".join(traceback.format_exception(err)).rstrip()


def _complain_error(message: str) -> None:
    lines = f"error: {message}".splitlines()
    if sys.stderr.isatty():
        import shutil

        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in _wrap(line, width)]
    first = lines[0].removeprefix("error:")
    complain(click.style("error:", fg="red", bold=True) + first)
    for line in lines[1:]:
        complain(line)


def _wrap(line: str, width: int) -> list[str]:
    return wrap_text(line, width, " " * (len(line) - len(line.lstrip(" -")) or 2))
