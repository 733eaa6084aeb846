"""`dovetail version`."""

from __future__ import annotations

import platform
import re
from importlib import metadata

import click

from dovetail._version import __version__
from dovetail.cli._console import format_columns, say
from dovetail.cli._errors import debug_option


@click.command()
@debug_option
def version() -> None:
    """Print the versions of what a run builds on."""
    rows = [
        ("dovetail", __version__),
        ("python", f"{platform.python_version()} ({platform.platform()})"),
        *((name, found) for name, found in installed_versions().items()),
    ]
    for line in format_columns(rows):
        say(line)


def installed_versions() -> dict[str, str]:
    """Return the versions of what dovetail and its extras require, and of other plugin packages.

    Nothing is imported; a package of an extra that is not installed is left out.
    """
    from dovetail.registry.listing import list_entry_points, normalize

    required = [re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0] for r in _requirements()]
    plugins = [info.distribution for info in list_entry_points()]
    versions = {}
    for name in dict.fromkeys(map(normalize, [*required, *plugins])):
        if name == "dovetail":
            continue
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _requirements() -> list[str]:
    try:
        return metadata.requires("dovetail") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return []
