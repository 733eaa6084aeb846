"""What is wrong with installed plugins that their files and metadata tell; nothing is imported."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from dovetail._markers import GROUPS, WRAPPER_GROUP
from dovetail.errors import build_message
from dovetail.registry.listing import PluginInfo, normalize

Kind: TypeAlias = Literal["broken", "slow", "note"]

_GROUPS = (*GROUPS.values(), WRAPPER_GROUP)


@dataclass(frozen=True)
class Finding:
    """Something that a user of plugins should know."""

    kind: Kind
    """Whether it keeps a plugin from working, costs time, or is worth knowing."""
    text: str
    remedy: str | None = None
    """What to do, where `text` does not say so: a command or a sentence."""
    explains: frozenset[str] = frozenset()
    """Import paths of the plugins that cannot load because of it."""


@dataclass(frozen=True)
class Installed:
    """The metadata of one distribution that offers plugins."""

    path: Path
    """Its `dist-info` or `egg-info` folder."""
    entries: tuple[EntryPoint, ...]
    """Its entry points in the groups of dovetail."""

    @cached_property
    def distribution(self) -> Distribution:
        """What the standard library makes of the folder."""
        return Distribution.at(self.path)

    @property
    def name(self) -> str:
        """The distribution's name; that of the folder where there is no metadata."""
        if self.has_metadata and (name := self.distribution.metadata["Name"]):
            return name
        return self.path.stem.partition("-")[0].replace("_", "-")

    @property
    def has_metadata(self) -> bool:
        """Whether the file is there that names the distribution."""
        return any((self.path / name).is_file() for name in ("METADATA", "PKG-INFO"))

    @property
    def objects(self) -> frozenset[str]:
        """Import paths of its plugins."""
        return frozenset(entry.value for entry in self.entries)


def check_installs() -> Iterator[Finding]:
    """Yield what is wrong with the metadata and the files of distributions that offer plugins."""
    by_name: dict[str, list[Installed]] = defaultdict(list)
    for installed in find_installed():
        if installed.has_metadata:
            by_name[normalize(installed.name)].append(installed)
        else:
            yield _without_metadata(installed)
    for group in by_name.values():
        if len(group) > 1:
            yield _twice(group)
        # The first one on the path is the one that counts.
        yield from _check_files(group[0])


def find_installed() -> list[Installed]:
    """Return the distributions on the path that offer plugins, every copy of them."""
    folders = dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path)
    found = []
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted([*folder.glob("*.dist-info"), *folder.glob("*.egg-info")]):
            if not (path / "entry_points.txt").is_file():
                continue
            entries = [e for e in Distribution.at(path).entry_points if e.group in _GROUPS]
            if entries:
                found.append(Installed(path, tuple(entries)))
    return found


def editable_folder(found: Distribution | str) -> Path | None:
    """Return the folder that an editable install leads to, or `None` for any other.

    Args:
        found: A distribution, or the name of one.

    Source: the specification of `direct_url.json` (PEP 610, PEP 660).
    """
    try:
        found = distribution(found) if isinstance(found, str) else found
        content = json.loads(found.read_text("direct_url.json") or "{}")
        if not content.get("dir_info", {}).get("editable"):
            return None
        return Path(url2pathname(unquote(urlsplit(content["url"]).path)))
    except (PackageNotFoundError, ValueError, KeyError, AttributeError):
        return None


def check_names(plugins: Sequence[PluginInfo]) -> Iterator[Finding]:
    """Yield the names that two distributions offer for one hook.

    Args:
        plugins: All that may be seen.
    """
    owners: dict[tuple[str, str], list[PluginInfo]] = defaultdict(list)
    for info in plugins:
        owners[info.role, info.name].append(info)
    for (role, name), rivals in owners.items():
        if len(rivals) > 1:
            where = f"{'run.plugins' if role == 'wrap' else f'{role}.use'} = {name!r}"
            who = " and by ".join(f"{p.distribution} {p.version}".rstrip() for p in rivals)
            text = build_message(where, f"the name is offered by {who}")
            choices = " or ".join(f'"{p.distribution}:{name}"' for p in rivals)
            yield Finding("note", text, f"Write {choices} in a config.")


def _without_metadata(installed: Installed) -> Finding:
    offers = ", ".join(f"{e.group.rpartition('.')[2]} {e.name}" for e in installed.entries)
    found = f"offers plugins ({offers}) and has no METADATA: an installation was interrupted"
    text = build_message(f"folder {str(installed.path)!r}", found)
    return Finding("broken", text, f"Delete the folder, then: {_reinstall(installed)}")


def _twice(group: Sequence[Installed]) -> Finding:
    folders = {installed.path.parent for installed in group}
    where = f"distribution {group[0].name!r}"
    if len(folders) < len(group):
        names = " and ".join(installed.path.name for installed in group)
        found = f"{names} lie side by side; which of them counts is left to chance"
        remedy = f"Delete both folders, then: {_reinstall(group[0])}"
        return Finding("broken", build_message(where, found), remedy)
    places = " and in ".join(str(installed.path) for installed in group)
    text = build_message(where, f"is installed in {places}; the first one counts")
    return Finding("note", text, f"Remove one: pip uninstall {group[0].name}")


def _check_files(installed: Installed) -> Iterator[Finding]:
    where = f"distribution {installed.name!r}"
    folder = editable_folder(installed.distribution)
    if folder is not None and not folder.is_dir():
        found = f"was installed to be edited in {str(folder)!r}, which is gone"
        remedy = f"Install it from where it is now, or: pip uninstall {installed.name}"
        yield Finding("broken", build_message(where, found), remedy, installed.objects)
        return
    for module in dict.fromkeys(entry.module.partition(".")[0] for entry in installed.entries):
        values = frozenset(v for v in installed.objects if v.startswith(module))
        file, is_there = _locate(module)
        if not is_there:
            found = f"its entry points name the module {module!r}, which is not there"
            text = build_message(where, found)
            yield Finding("broken", text, _reinstall(installed), values)
        elif file is not None and not _is_own(file, module, installed, folder):
            found = f"its module {module!r} is hidden by {str(file)!r}, which is not its own"
            yield Finding("broken", build_message(where, found), "Rename or remove that file.")
        elif file is not None and (rival := _namesake_here(module, file)):
            found = f"a module in the working directory, {rival.name!r}, has the name of its own"
            hint = "`python -m` and `torchrun -m` put that folder first: rename the file."
            yield Finding("note", build_message(where, found), hint)


def _locate(module: str) -> tuple[Path | None, bool]:
    """Return the file of a top-level module, if it has one, and whether the module is there."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None, False
    if spec is None:
        return None, False
    has_file = spec.has_location and spec.origin is not None
    return (Path(str(spec.origin)).resolve() if has_file else None), True


def _is_own(file: Path, module: str, installed: Installed, folder: Path | None) -> bool:
    """Return whether a module's file is its distribution's, as far as the metadata tells."""
    if folder is not None:
        return file.is_relative_to(folder.resolve())
    recorded = installed.distribution.files if installed.path.suffix == ".dist-info" else None
    if recorded is None:
        return file.is_relative_to(installed.path.parent)
    own = [f for f in recorded if f.parts[0].partition(".")[0] == module]
    # An installer of its own kind may have recorded a link to the sources alone.
    return not own or file in (Path(str(f.locate())).resolve() for f in own)


def _namesake_here(module: str, own: Path) -> Path | None:
    here = Path.cwd()
    candidates: Iterable[Path] = (here / f"{module}.py", here / module / "__init__.py")
    return next((p for p in candidates if p.is_file() and p.resolve() != own), None)


def _reinstall(installed: Installed) -> str:
    return f"pip install --force-reinstall {installed.name}"
