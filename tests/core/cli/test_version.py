"""`dovetail version`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from click.testing import Result

from dovetail import __version__
from dovetail.cli.version import installed_versions


def test_version_lists_dovetail_python_and_torch_first_lines(
    run_cli: Callable[..., Result],
) -> None:
    rows = [line.split() for line in run_cli("version").stdout.splitlines()]
    assert rows[0] == ["dovetail", __version__]
    assert rows[1][0] == "python"
    assert ["torch", metadata.version("torch")] in rows


def test_versions_hold_distributions_that_offer_plugins(install: Callable[..., Path]) -> None:
    install("other-tools", {"log": ("other",)})
    assert installed_versions()["other-tools"] == "1.2"


def test_versions_leave_out_what_is_not_installed() -> None:
    assert all(metadata.version(name) == version for name, version in installed_versions().items())
    assert "torchserve" not in installed_versions()
