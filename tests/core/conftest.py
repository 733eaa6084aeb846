"""Distributions that exist as metadata and modules alone, as an installer leaves them."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest


class Site:
    """A folder of installed distributions, made of nothing but their metadata and modules."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: list[str] = []

    def add(
        self,
        distribution: str,
        entry_points: Mapping[str, Mapping[str, str]],
        *,
        version: str = "1.2",
        requires: Sequence[str] = (),
        **modules: str,
    ) -> None:
        """Install a distribution.

        Args:
            distribution: Its name.
            entry_points: Objects by group and name.
            version: Its version.
            requires: Its requirements, extras' too.
            modules: Source by module name.
        """
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        head = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines = [*head, *(f"Requires-Dist: {r}" for r in requires), ""]
        (info / "METADATA").write_text("\n".join(lines), encoding="utf-8")
        self.add_entry_points(info, entry_points)
        for name, source in modules.items():
            self.add_module(name, source)

    def add_entry_points(self, info: Path, entry_points: Mapping[str, Mapping[str, str]]) -> None:
        """Write the entry points of the `dist-info` folder `info`."""
        lines = []
        for group, names in entry_points.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")

    def add_module(self, name: str, source: str) -> None:
        """Write a top-level module."""
        self.modules.append(name)
        (self.path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder of distributions on `sys.path`, in which a test installs what it needs."""
    path = tmp_path / "site-packages"
    path.mkdir()
    monkeypatch.setattr(sys, "path", [str(path), *sys.path])
    made = Site(path)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)
