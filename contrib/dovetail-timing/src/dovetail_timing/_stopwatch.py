"""Measures a piece of work and tells of it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOGGER = logging.getLogger("dovetail_timing")


@dataclass
class Timing:
    """What is known of a piece of work."""

    result: str = ""
    """What came out of it."""


@contextmanager
def measure(name: str) -> Iterator[Timing]:
    """Log how long the block takes, also one that raises.

    Args:
        name: What the line calls it.
    """
    timing = Timing()
    start_s = time.perf_counter()
    try:
        yield timing
    except BaseException as err:
        _tell(name, start_s, f"raised {type(err).__name__}")
        raise
    _tell(name, start_s, timing.result)


def _tell(name: str, start_s: float, result: str) -> None:
    seconds = time.perf_counter() - start_s
    # Who names the plugin wants its lines: the root logger's usual level would drop them.
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if LOGGER.hasHandlers():
        LOGGER.info("%s: %.3f s, %s", name, seconds, result)
    elif LOGGER.isEnabledFor(logging.INFO):
        sys.stderr.write(f"timing: {name}: {seconds:.3f} s, {result}\n")
