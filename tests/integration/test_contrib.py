"""Every distribution of `contrib/` is whole, listed, and uses the public door alone."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dovetail.registry.listing import KNOWN_CONTRIB

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CONTRIB = ROOT / "contrib"
FOLDERS = sorted(path.parent for path in CONTRIB.glob("*/pyproject.toml"))
ROLES = {
    "dovetail.compile": "compile",
    "dovetail.collate": "collate",
    "dovetail.accumulate": "accumulate",
    "dovetail.log": "log",
    "dovetail.export": "export",
    "dovetail.plugins": "wrap",
}

pytestmark = pytest.mark.skipif(not CONTRIB.is_dir(), reason="a source archive has no contrib/")
each = pytest.mark.parametrize("folder", FOLDERS, ids=[path.name for path in FOLDERS])


def metadata(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def entry_points(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = metadata(folder)["project"]["entry-points"]
    return found


def imported(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield module and name of each import; the name of a plain `import` is `None`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def closed_doors(source: str) -> list[str]:
    """Return what a contributed module imports and must not."""
    found = []
    for module, name in imported(source):
        top, *inner = module.split(".")
        if top == "dovetail_plugins":
            found.append(f"{module} is a built-in")
        if top != "dovetail":
            continue
        if any(part.startswith("_") for part in [*inner, name or ""]):
            found.append(f"{module}.{name} has an underscore")
        elif not _is_there(module, name):
            found.append(f"{module}.{name} is not offered")
    return found


def _is_there(module: str, name: str | None) -> bool:
    """Return whether a module offers a name: in `__all__`, or as a definition of its own."""
    if importlib.util.find_spec(module) is None:
        return False
    offered = importlib.import_module(module)
    if name is None or name in getattr(offered, "__all__", ()):
        return True
    if hasattr(offered, "__all__"):
        return importlib.util.find_spec(f"{module}.{name}") is not None
    return hasattr(offered, name) or name in _names_for_checkers(offered)


def _names_for_checkers(module: ModuleType) -> set[str]:
    """Return the names that a module defines for type checkers only."""
    body = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
    inside = [n for block in body if isinstance(block, ast.If) for n in block.body]
    targets = [n.target for n in inside if isinstance(n, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_workspace_holds_every_folder_of_contrib() -> None:
    folders = sorted(p for p in CONTRIB.iterdir() if p.is_dir())
    assert folders == FOLDERS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["uv"]["workspace"]["members"] == ["contrib/*"]


def test_known_contrib_is_what_is_there() -> None:
    """An error about a name that is not installed says which distribution has it."""
    offered = {
        (ROLES[group], name): folder.name
        for folder in FOLDERS
        for group, entries in entry_points(folder).items()
        for name in entries
    }
    assert dict(KNOWN_CONTRIB) == offered


@each
def test_distribution_is_whole(folder: Path) -> None:
    project = metadata(folder)["project"]
    module = folder.name.replace("-", "_")
    assert project["name"] == folder.name
    assert project["license"] == "Apache-2.0"
    assert "dovetail" in project["dependencies"]
    assert any("dovetail[" in r for r in project["optional-dependencies"]["test"])
    assert metadata(folder)["tool"]["uv"]["sources"]["dovetail"] == {"workspace": True}
    assert (folder / "src" / module / "py.typed").is_file()
    assert (folder / "tests" / "test_conformance.py").is_file()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"pip install ./contrib/{folder.name}" in readme
    assert "```toml" in readme


@each
def test_entry_points_name_a_module_of_the_distribution(folder: Path) -> None:
    assert set(entry_points(folder)) <= set(ROLES)
    for group, entries in entry_points(folder).items():
        for value in entries.values():
            source = (folder / "src" / value / "__init__.py").read_text(encoding="utf-8")
            names = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
            assert "\ndovetail_api = 1\n" in source
            assert group == "dovetail.plugins" or group.replace(".", "_") in names


@each
def test_distribution_has_a_tox_environment(folder: Path) -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    short = folder.name.removeprefix("dovetail-")
    section = next(name for name in tox if name.startswith("testenv:contrib-"))
    assert short in section.partition("{")[2].rstrip("}").split(",")
    assert section.removeprefix("testenv:") in tox["tox"]["env_list"].split()
    lines = [line.split(":") for line in tox[section]["change_dir"].split("\n") if line]
    homes = {name.strip(): path.strip() for name, path in lines}
    assert homes[short] == f"contrib{{/}}{folder.name}"


@each
def test_sources_use_the_public_door(folder: Path) -> None:
    sources = sorted((folder / "src").rglob("*.py"))
    assert sources
    faults = {p.name: closed_doors(p.read_text(encoding="utf-8")) for p in sources}
    assert not {name: found for name, found in faults.items() if found}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from dovetail._markers import hookimpl", "underscore"),
        ("import dovetail._markers", "underscore"),
        ("from dovetail.run.tracking import _encode", "underscore"),
        ("from dovetail_plugins import GradientAccumulator", "built-in"),
        ("def f():\n    import dovetail_plugins.log.wandb", "built-in"),
        ("from dovetail import Registry", "not offered"),
        ("from dovetail.nothing import something", "not offered"),
        ("from dovetail import hookimpl, PluginOptions", ""),
        ("from dovetail.errors import build_message\nimport torch\nfrom . import _own", ""),
    ],
)
def test_closed_doors_are_found(source: str, fault: str) -> None:
    found = closed_doors(source)
    assert len(found) == bool(fault)
    assert all(fault in text for text in found)
