"""What a list of requirements brings into an environment: distributions and their modules."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dovetail.registry.listing import normalize

_VERSION = r"(?:===|==|~=|!=|<=|>=|<|>)\s*[\w.*+!-]+"
_REQUIREMENT = re.compile(
    rf"(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)\s*(?:\[[\w\s,.-]*\])?"
    rf"\s*(?P<versions>{_VERSION}(?:\s*,\s*{_VERSION})*)?\s*(?:;.*)?"
)


def find_fault(requirement: object) -> str:
    """Say what is wrong with a requirement; an empty text if it is one with a floor."""
    match = _REQUIREMENT.fullmatch(requirement) if isinstance(requirement, str) else None
    if match is None:
        return "is no requirement"
    versions = match["versions"] or ""
    return "" if re.search(r"===|==|~=|>=|>", versions) else "has no lowest version"


def name_of(requirement: str) -> str:
    """Return the comparable name of a requirement's distribution."""
    match = re.match(r"[\w.-]+", requirement)
    return normalize(match[0] if match else requirement)


def find_closure(requirements: Iterable[str]) -> set[str]:
    """Return the distributions that requirements need, with what those need in turn.

    Extras are left out; markers are not looked at, as what they exclude is not installed.
    """
    waiting, found = [name_of(r) for r in requirements], set[str]()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [name_of(r) for r in needed if not re.search(r";.*\bextra\b", r)]
    return found


def list_modules(names: Iterable[str]) -> set[str]:
    """Return the top-level modules of distributions, those of editable installations too."""
    modules: set[str] = set()
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        modules.add(name.replace("-", "_"))
        modules |= set((distribution.read_text("top_level.txt") or "").split())
        modules |= {entry.value.partition(":")[0] for entry in distribution.entry_points}
        for file in distribution.files or ():
            modules |= set(_modules_of(file.parts, Path(str(distribution.locate_file(file)))))
    return {module.partition(".")[0] for module in modules if module}


def _modules_of(parts: tuple[str, ...], place: Path) -> Iterator[str]:
    if len(parts) == 1 and parts[0].endswith(".pth"):
        for line in place.read_text(encoding="utf-8").splitlines() if place.exists() else ():
            folder = Path(line)
            if line and not line.startswith(("#", "import ")) and folder.is_dir():
                yield from (inspect.getmodulename(p) or p.name for p in folder.iterdir())
    elif len(parts) == 1:
        yield inspect.getmodulename(parts[0]) or ""
    elif parts[0] not in ("..", "__pycache__") and not parts[0].endswith(".dist-info"):
        yield parts[0]
