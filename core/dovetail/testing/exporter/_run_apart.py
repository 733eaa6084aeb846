"""A process that sees the modules it is allowed to and runs an artifact.

Reads a request as JSON from stdin. Whatever else is installed is not there: neither to an import
nor to a look at what is installed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class Allowed:
    """Finds modules as usual, but only those that are allowed."""

    def __init__(self, finders: Sequence[Any], modules: Iterable[str], names: list[str]) -> None:
        self._finders = finders
        self._modules = {*modules, *sys.stdlib_module_names, "__main__"}
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of an allowed module."""
        root = name.partition(".")[0]
        # Python keeps how it was built in a module whose name holds the platform's.
        if root not in self._modules and not root.startswith("_sysconfigdata"):
            return None
        for finder in self._finders:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def find_distributions(self, context: Any) -> Any:
        """Yield the allowed distributions."""
        for finder in self._finders:
            for found in getattr(finder, "find_distributions", lambda context: ())(context):
                if re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() in self._names:
                    yield found

    def invalidate_caches(self) -> None:
        """Look into the folders again."""
        for finder in self._finders:
            getattr(finder, "invalidate_caches", lambda: None)()


def find_loader(request: dict[str, Any]) -> Any:
    """Return the function that loads an artifact: the runtime's source, or the exporter's own."""
    if request["source"] is not None:
        namespace: dict[str, Any] = {"__name__": "runtime"}
        exec(compile(request["source"], "runtime_source()", "exec"), namespace)
        return namespace["load"]
    from dovetail.task import TaskSpec
    from dovetail.testing.processes import make_registry

    registry, options = make_registry(request)
    exporter = registry.export(request["name"], TaskSpec.from_dict(request["task"]), options)
    return lambda path: exporter.load(Path(path))


def main() -> None:
    """Run each artifact of a request and leave its outputs where the request says."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    sys.meta_path[:] = [Allowed(list(sys.meta_path), request["modules"], request["names"])]
    import numpy as np

    load = find_loader(request)
    for run in request["runs"]:
        with np.load(run["inputs"]) as inputs:
            outputs = load(run["artifact"])(dict(inputs))
        np.savez(run["outputs"], **outputs)


if __name__ == "__main__":
    main()
