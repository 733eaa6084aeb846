"""`dovetail schema`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from dovetail.cli._console import say
from dovetail.cli._errors import debug_option
from dovetail.cli._options import admission_options, flagged_registry

FILE_NAME = "dovetail.schema.json"
"""The schema beside a config."""


_EPILOG = """\
\b
How a config names its schema:
  TOML  #:schema ./dovetail.schema.json      the first line
        (taplo, Even Better TOML in VS Code, Tombi)
  JSON  "$schema": "./dovetail.schema.json"  the first key
        (VS Code and others)
"""


@click.command(epilog=_EPILOG)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--write", is_flag=True, help=f"Write {FILE_NAME} beside CONFIG, for editors.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to this file instead.",
)
@admission_options
@debug_option
def schema(config: Path | None, write: bool, output: Path | None) -> None:
    """Print the JSON Schema of the config, or write it.

    It holds the names and the options of the installed plugins too: write it again after an
    installation. Editors complete and check a config with it. --write puts it into the folder of
    CONFIG, or into the working directory, and says which line the config needs.
    """
    from dovetail.schema import build_schema

    if config is not None:
        if not write:
            hint = f"CONFIG says where --write puts {FILE_NAME}; add --write."
            raise click.UsageError(hint, click.get_current_context())
        _check_file(config)
    folder = config.parent if config is not None else Path()
    path = output or (folder / FILE_NAME if write else None)
    text = json.dumps(build_schema(flagged_registry()), indent=2)
    if path is None:
        say(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as err:
        raise click.UsageError(f"{str(path)!r} cannot be written: {err.strerror}.") from err
    say(f"wrote {path}")
    if write:
        for line in _describe_directive(config, path):
            say(line)


def _check_file(config: Path) -> None:
    """Refuse a config that does not read, before torch is imported, which takes seconds."""
    from dovetail.config import read_config_file

    read_config_file(config)


def _describe_directive(config: Path | None, path: Path) -> Iterator[str]:
    """Yield how a config names its schema, or that it does."""
    folder = config.parent if config is not None else Path()
    name = _relative(path, folder)
    toml, js = f"#:schema {name}", f'"$schema": {json.dumps(name)},'
    if config is None:
        yield "So that editors use it for a config beside it:"
        yield f"  TOML, first line  {toml}"
        yield f"  JSON, first key   {js}"
        return
    is_json = config.suffix.lower() == ".json"
    found = _find_directive(config, is_json=is_json)
    if found is not None and (folder / found).resolve() == path.resolve():
        yield f"{config} names it; editors use it."
        return
    wanted = f"first {'key' if is_json else 'line'} of {config}"
    before = f" in place of {found!r}" if found is not None else ""
    yield f"So that editors use it, make this the {wanted}{before}:"
    yield f"  {js if is_json else toml}"


def _relative(path: Path, folder: Path) -> str:
    try:
        return f"./{path.resolve().relative_to(folder.resolve()).as_posix()}"
    except ValueError:  # elsewhere, by --output
        return path.resolve().as_posix()


def _find_directive(config: Path, *, is_json: bool) -> str | None:
    """Return the schema that a config names, if it names one."""
    text = config.read_text(encoding="utf-8-sig")
    if is_json:
        found = json.loads(text).get("$schema")
        return found if isinstance(found, str) else None
    for line in text.splitlines():
        # Editors look among the comments at the top.
        if line.startswith("#:schema "):
            return line.removeprefix("#:schema ").strip()
        if line.strip() and not line.startswith("#"):
            break
    return None
