"""Where a run's lines go: under a moving bar, plainly, or nowhere."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dovetail.cli._console import say

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from dovetail.cli._watch import Standing

Mode: TypeAlias = Literal["live", "plain", "quiet"]

REFRESHES_PER_S = 5
"""Drawing the bar takes the training thread's interpreter for half a millisecond each time."""


def is_first_process() -> bool:
    """Return whether this is the process that speaks for all that a launcher started.

    Source: the environment that `torchrun` sets.
    """
    return os.environ.get("RANK", "0") in ("", "0")


def choose_mode(*, quiet: bool, plain: bool) -> Mode:
    """Return how progress is shown."""
    if quiet or not is_first_process():
        return "quiet"
    if plain or not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return "plain"
    return "live"


class Screen:
    """Prints lines, below which a bar may move.

    Args:
        mode: How progress is shown.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._live: Live | None = None
        self._is_lost = mode == "quiet"

    def say(self, text: str) -> None:
        """Print a line; where it cannot be printed, the run goes on without."""
        if self._is_lost:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            say(text)
        except OSError:
            self._is_lost = True

    def bar(self, ask: Callable[[], Standing]) -> AbstractContextManager[Any]:
        """Return the context in which a bar shows what `ask` answers, if one is wanted."""
        return self._draw_bar(ask) if self.mode == "live" else nullcontext()

    @contextmanager
    def _draw_bar(self, ask: Callable[[], Standing]) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

        streams = sys.stdout, sys.stderr
        live = Live(
            get_renderable=lambda: draw_standing(ask()),
            console=Console(),
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )

        def forget() -> None:
            # A forked loader worker has no thread that draws, and maybe that thread's lock, held.
            if self._live is live:
                self._live = None
                sys.stdout, sys.stderr = streams

        if hasattr(os, "register_at_fork"):  # Windows knows no fork
            os.register_at_fork(after_in_child=forget)
        with live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def warnings_as_lines(self) -> AbstractContextManager[None]:
        """Show each warning as one line among the others."""
        return warnings_as_lines(self.say)


@contextmanager
def warnings_as_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Show each warning as one line, without the place in the source that raised it.

    Args:
        say: Prints a line.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def draw_standing(standing: Standing) -> RenderableType:
    """Return the bar as rich draws it: one line, as wide as the terminal."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    total = None if standing.fraction is None else 1.0
    bar = ProgressBar(total=total, completed=standing.fraction or 0.0, pulse=total is None)
    table.add_row(Text(standing.left), bar, Text(standing.right))
    return table
