"""`dovetail watch`: a run that another process trains, followed in the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail.cli._errors import FAILED, debug_option
from dovetail.cli._runs import dir_option

if TYPE_CHECKING:
    from dovetail.cli._screen import Screen
    from dovetail.cli._story import RunStory
    from dovetail.cli._watch import Standing

POLL_S = 0.5
"""Seconds between two looks at the log."""


@click.command()
@click.argument("wanted", metavar="RUN", default="latest")
@dir_option
@click.option("--plain", is_flag=True, help="Lines instead of a moving bar.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds between two lines inside an epoch, where there is no bar.",
)
@debug_option
def watch(wanted: str, root: Path, plain: bool, every_s: float) -> None:
    """Follow a run that is under way.

    It ends with the run. The run's metric log is read and nothing else is touched; Ctrl-C ends the
    watching, not the run. The exit status is 1 if the run failed or its process is gone, else 0.

    RUN is a run's folder, its id, or "latest".
    """
    from dovetail.cli._screen import Screen, choose_mode
    from dovetail.run.lookup import resolve_run

    run_dir = resolve_run(wanted, root)
    screen = Screen(choose_mode(quiet=False, plain=plain))
    try:
        is_well = Watching(run_dir, screen, every_s).run()
    except KeyboardInterrupt:
        screen.say(f"no longer watched; the run is left alone: {run_dir}")
        return
    if not is_well:
        raise click.exceptions.Exit(FAILED)


class Watching:
    """Looks at a run's log again and again.

    Args:
        run_dir: The run's folder.
        screen: Where lines and bar go.
        every_s: Seconds between two plain lines.
    """

    def __init__(self, run_dir: Path, screen: Screen, every_s: float) -> None:
        from dovetail.cli._story import RunStory
        from dovetail.run.settings import read_settings
        from dovetail.run.tail import LogTail

        self._run_dir = run_dir
        self._screen = screen
        self._every_s = every_s
        self._settings = read_settings(run_dir)
        self._tail = LogTail(run_dir)
        self._story: RunStory = RunStory(self._settings)
        self._next_line_s = 0.0
        self._has_told_silence = False

    def run(self) -> bool:
        """Watch until the run ends; return whether it ended well."""
        self._screen.say(f"watching {self._run_dir}")
        with self._screen.bar(self._standing):
            while True:
                # Asked first, so that what a process wrote at its very end is not missed.
                is_gone = self._is_gone()
                has_news = self._look()
                if self._story.end is not None:
                    return self._tell_end()
                if is_gone and not has_news:
                    step = self._story.step
                    self._screen.say(f"the process is gone after step {step}; its log has no end")
                    return False
                self._wait()

    def _standing(self) -> Standing:
        return self._story.standing()  # a resume begins another story

    def _wait(self) -> None:
        time.sleep(POLL_S)

    def _is_gone(self) -> bool:
        from dovetail.run.overview import has_lock, is_alive

        # Without a lock only silence tells, and a slow step is silent, too.
        return has_lock(self._run_dir) and not is_alive(self._run_dir)

    def _look(self) -> bool:
        """Take what is new and tell it; return whether there was anything."""
        from dovetail.cli._story import RunStory

        records, is_anew = self._tail.read()
        if is_anew:
            self._screen.say("the run was resumed from an earlier checkpoint")
            self._story = RunStory(self._settings)
        lines = [line for record in records if (line := self._story.take(record)) is not None]
        # Of what had happened before, the latest is enough; after a resume it was told already.
        is_first = not self._next_line_s or is_anew
        for line in lines[-1:] if is_first else lines:
            self._screen.say(line)
        self._tell_standing(has_news=bool(records), has_told=bool(lines))
        return bool(records)

    def _tell_standing(self, *, has_news: bool, has_told: bool) -> None:
        """In plain mode, say now and then how the run stands, and once that it has gone silent."""
        now_s = time.monotonic()
        if has_told or not self._next_line_s:
            self._next_line_s = now_s + self._every_s
        if self._screen.mode == "live":
            return
        silence = self._story.silence()
        if has_news and now_s >= self._next_line_s:
            self._screen.say(self._story.line())
            self._next_line_s = now_s + self._every_s
        elif silence and not self._has_told_silence and self._story.end is None:
            self._screen.say(silence)
        self._has_told_silence = bool(silence)

    def _tell_end(self) -> bool:
        end = self._story.end or {}
        status, error = end.get("status", "completed"), end.get("error")
        self._screen.say(
            f"{status} after step {self._story.step}" + (f": {error}" if error else "")
        )
        return bool(status != "failed")
