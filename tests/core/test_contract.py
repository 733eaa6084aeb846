"""The contract with plugins holds together, and stays what it was.

`contract.json` beside this file is the contract of the current `API_VERSION`. Within a version a
hook may gain arguments, and nothing else changes; run this file to write the next version's.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from dovetail import deprecations, hookspecs, testing, types
from dovetail._markers import API_VERSION, HOOKS, OLDEST_API_VERSION, HookName, hook_function
from dovetail.registry import ROLES, Registry, Role
from dovetail.scaffold import write_plugin

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("contract.json")
PARTS = ("Accumulator", "Collator", "Exporter", "Runner", "Tracker")


def signature_of(hook: HookName) -> inspect.Signature:
    return inspect.signature(getattr(hookspecs, hook_function(hook)))


def members_of(part: type) -> dict[str, Any]:
    """Return the parameters of each method, those with defaults marked, and the properties."""
    members: dict[str, Any] = {}
    for name, member in vars(part).items():
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
            parameters = list(inspect.signature(member).parameters.values())[1:]
            members[name] = [
                p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters
            ]
        elif isinstance(member, property):
            members[name] = "property"
    return members


def contract() -> dict[str, Any]:
    return {
        "api": API_VERSION,
        "hooks": {hook_function(hook): list(signature_of(hook).parameters) for hook in HOOKS},
        "parts": {name: members_of(getattr(types, name)) for name in PARTS},
    }


def test_contract_keeps_what_this_version_promised() -> None:
    recorded, current = json.loads(RECORD.read_text()), contract()
    hint = "deprecate it first, then raise API_VERSION and run python tests/core/test_contract.py"
    assert recorded["api"] == current["api"], "run python tests/core/test_contract.py"
    assert set(recorded["hooks"]) == set(current["hooks"]), hint
    for hook, arguments in recorded["hooks"].items():
        gone = [name for name in arguments if name not in current["hooks"][hook]]
        assert gone == [], f"{hook} lost {gone}: {hint}"
    assert recorded["parts"] == current["parts"], hint


def test_deprecated_hooks_and_arguments_are_still_there() -> None:
    assert set(deprecations.HOOKS) <= {hook_function(hook) for hook in HOOKS}
    for function, arguments in deprecations.ARGUMENTS.items():
        known = inspect.signature(getattr(hookspecs, function)).parameters
        assert set(arguments) <= set(known)
    assert OLDEST_API_VERSION <= API_VERSION


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_typed_method_of_the_registry_with_its_arguments(hook: HookName) -> None:
    method = inspect.signature(getattr(Registry, hook))
    assert list(method.parameters) == ["self", "name", *signature_of(hook).parameters]


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_stands_in_the_reference_with_its_exact_signature(hook: HookName) -> None:
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    shown = str(signature_of(hook)).replace("'", "")
    assert f"## `{hook_function(hook)}{shown}`\n" in page


@pytest.mark.parametrize("role", ROLES)
def test_hook_has_a_suite_a_scaffold_and_a_page(role: Role, tmp_path: Path) -> None:
    suites = [getattr(testing, name) for name in testing.__all__ if name.endswith("Suite")]
    assert [suite for suite in suites if getattr(suite, "hook", None) == role] != []
    written = write_plugin("mine", role, tmp_path)
    assert (written / "tests" / "test_conformance.py").is_file()
    pages = [p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "how-to").glob("*.md")]
    assert any(f"--hook {role}\n" in page for page in pages)


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_called_by_the_run_and_tested_where_it_is_called(hook: HookName) -> None:
    package = ROOT / "core" / "dovetail"
    files = [*(package / "pipeline").glob("*.py"), package / "run" / "tracking" / "trackers.py"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert re.search(rf"registry\.{hook}\(", source), f"no run calls {hook}"
    tests = (ROOT / "tests" / "core" / "registry" / "test_calling.py").read_text(encoding="utf-8")
    assert f"registry.{hook}(" in tests or f'"{hook}"' in tests


def test_roles_are_the_hooks_and_wrap() -> None:
    assert get_args(Role) == (*HOOKS, "wrap")


if __name__ == "__main__":
    RECORD.write_text(json.dumps(contract(), indent=2) + "\n")
    sys.stdout.write(f"{RECORD}\n")
