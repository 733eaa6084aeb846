"""`dovetail schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dovetail.cli._console import say
from dovetail.cli._errors import debug_option


@click.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to a file instead.",
)
@debug_option
def schema(output: Path | None) -> None:
    """Print the JSON Schema of the config.

    It holds the options of the installed plugins too. An editor that knows JSON Schema completes
    and checks a config with it: write `#:schema FILE` into the first line of the TOML file.
    """
    from dovetail.schema import build_schema

    text = json.dumps(build_schema(), indent=2)
    if output is None:
        say(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as err:
        raise click.UsageError(f"{str(output)!r} cannot be written: {err.strerror}.") from err
    say(f"wrote {output}")
