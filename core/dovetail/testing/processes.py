"""How a suite has a part of its work done by another process."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dovetail.registry import Registry
from dovetail.testing.suite import ConformanceError

if TYPE_CHECKING:
    from dovetail.config import PluginOptions
    from dovetail.testing.suite import Suite

_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Runs a file without its folder on the import path, where `suite.py` would hide others."""

_TIMEOUT_S = 300.0


def describe_suite(suite: Suite) -> dict[str, Any]:
    """Return what another process needs to make the same backend again, JSON-able.

    Raises:
        unittest.SkipTest: The backend is an object of this process that cannot be pickled.
    """
    return {
        "path": import_path(),
        "hook": suite.hook,
        "name": suite.name,
        "options": dict(suite.options),
        "task": suite.task.to_dict(),
        "module": _module_name(suite.plugin),
        "pickled": _pickled(suite.plugin),
    }


def import_path() -> list[str]:
    """Return where this process finds modules, as another one can use it from another folder."""
    return [os.path.abspath(entry) for entry in sys.path if entry]


def _module_name(plugin: object) -> str | None:
    return plugin.__name__ if isinstance(plugin, ModuleType) else None


def _pickled(plugin: object) -> str | None:
    if plugin is None or isinstance(plugin, ModuleType):
        return None
    try:
        return pickle.dumps(plugin).hex()
    except Exception as err:
        reason = f"{type(plugin).__name__} cannot be pickled, and this check needs it in a process"
        raise unittest.SkipTest(f"{reason} of its own; make it a module, or install it") from err


def make_registry(request: Mapping[str, Any]) -> tuple[Registry, PluginOptions]:
    """Return the registry and the options that `describe_suite` told of."""
    registry = Registry()
    if request["module"]:
        plugin: object = importlib.import_module(request["module"])
    else:
        plugin = pickle.loads(bytes.fromhex(request["pickled"])) if request["pickled"] else None
    if plugin is not None:
        registry.register(plugin, hook=request["hook"], name=request["name"])
    return registry, registry.build_options(request["hook"], request["name"], request["options"])


def run_process(script: str, request: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a script of this package in a fresh process, in an empty folder.

    Args:
        script: Path of the file in this package.
        request: JSON-able; what it reads from its stdin.

    Raises:
        ConformanceError: It did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="dovetail-", ignore_cleanup_errors=True) as empty:
        try:
            return subprocess.run(
                [sys.executable, "-B", "-c", _RUN, str(Path(__file__).parent / script)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                encoding="utf-8",
                cwd=empty,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            raise ConformanceError(f"its process did not end within {_TIMEOUT_S:g} s") from err


def last_line(ended: subprocess.CompletedProcess[str]) -> str:
    """Return what a process said last, for a message."""
    lines = ended.stderr.strip().splitlines()
    return lines[-1] if lines else f"status {ended.returncode}"
