from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pluggy
import pytest

from dovetail import hookspecs
from dovetail._markers import GROUPS, HOOKS, PROJECT, hook_function

SPECS: dict[str, Callable[..., Any]] = {
    name: function
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
    if name.startswith(f"{PROJECT}_")
}


def test_hookspecs_are_exactly_the_declared_hooks() -> None:
    assert set(SPECS) == {hook_function(hook) for hook in HOOKS}
    assert set(GROUPS) == set(HOOKS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_hookspec_answers_the_six_questions(name: str) -> None:
    doc = inspect.getdoc(SPECS[name]) or ""
    questions = ("When", "How often", "Answers", "Order", "Without an implementation", "Ownership")
    for question in questions:
        assert f"- **{question}:**" in doc


@pytest.mark.parametrize("name", sorted(SPECS))
def test_hookspec_is_typed_documented_and_ends_with_options(name: str) -> None:
    signature = inspect.signature(SPECS[name])
    assert signature.return_annotation.endswith("| None")
    assert list(signature.parameters)[-1] == "options"
    doc = inspect.getdoc(SPECS[name]) or ""
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.default is parameter.empty
        assert f"    {parameter.name}: " in doc


def test_hookspecs_take_the_first_result() -> None:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in SPECS:
        assert getattr(manager.hook, name).spec.opts["firstresult"]


def test_importing_the_frame_imports_no_heavy_library() -> None:
    code = (
        "import sys, dovetail, dovetail.hookspecs, dovetail.types, dovetail.registry;"
        "dovetail.registry.list_entry_points();"
        "heavy = {'torch', 'numpy', 'torchvision', 'pandas', 'onnx', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
