"""`dovetail plugins trace`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.cli._console import complain, format_columns, say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import admission_options, flagged_registry, json_option
from dovetail.cli._screen import warnings_as_lines

if TYPE_CHECKING:
    from dovetail.preflight import CheckedConfig
    from dovetail.registry.chain import HookCall

_HEADER = ("HOOK", "ORDER", "PLUGIN", "DISTRIBUTION", "MS", "RESULT")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
@admission_options
@debug_option
def trace(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every hook call of a run, without training.

    Everything is made that a run makes before its first step: model, data, and the part of each
    plugin, which are then let go. For each call: the plugins from the outermost to the backend,
    the milliseconds each spent in its own code, and the type of what it answered.

    Trackers are really opened, with a temporary folder for the run's, which is deleted at the end.
    One that reports to a server reports to it: leave it out with log.use=[], or give it a mode that
    does not.
    """
    from dovetail.preflight import check_config

    with tempfile.TemporaryDirectory(prefix="dovetail-trace-") as folder:
        here = (f"run.dir={json.dumps(folder)}", 'run.id="trace"')
        checked = check_config(config, (*overrides, *here), registry=flagged_registry())
        try:
            # What factories and plugins print is not part of the answer.
            with redirect_stdout(sys.stderr), warnings_as_lines(complain):
                _run_up_to_first_step(checked)
        finally:
            # Of a run that fails on its way, the calls that came before tell something too.
            _print_calls(checked.registry.history, as_json=as_json)


def _run_up_to_first_step(checked: CheckedConfig) -> None:
    from dovetail.pipeline import Job
    from dovetail.run.observer import RunObserver, RunPlan

    class Enough(Exception):  # noqa: N818 - no error: nothing is left to be seen
        pass

    class Stopper(RunObserver):
        def on_start(self, plan: RunPlan, run_dir: Path) -> None:
            raise Enough

    with suppress(Enough):
        Job(checked, None, None, Stopper()).run()


def _print_calls(history: Sequence[HookCall], *, as_json: bool) -> None:
    rows = [row for call in history for row in _rows(call)]
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    cells = [
        (r["hook"], str(r["order"]), r["plugin"], r["distribution"], f"{r['ms']:.1f}", r["result"])
        for r in rows
    ]
    for line in format_columns(cells, _HEADER):
        say(line)
    say()
    total_ms = sum(row["ms"] for row in rows)
    say(f"{len(history)} hook calls, {total_ms:.0f} ms in plugins; no step was taken")


def _rows(call: HookCall) -> Iterator[dict[str, Any]]:
    for position, plugin in enumerate(call.calls, 1):
        yield {
            "hook": call.hook,
            "order": position,
            "plugin": plugin.info.name,
            "distribution": plugin.info.distribution,
            "version": plugin.info.version,
            "ms": round(plugin.duration_s * 1e3, 3),
            "result": plugin.result,
        }
