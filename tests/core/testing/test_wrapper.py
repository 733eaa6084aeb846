from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from dovetail import hookimpl
from dovetail.errors import ExportError
from dovetail.registry import Registry
from dovetail.testing import ConformanceError, WrapperSuite

pytest.importorskip("torch")

Steps = Generator[None, Any, Any]

HANDED_ON = "every_part_is_handed_on"
WORK = "wrapped_parts_work"
ONCE = "the_backend_is_called_once"
ERRORS = "errors_pass_through"
UNNAMED = "it_does_not_act_unless_it_is_named"
TWICE = "named_twice_it_wraps_once"


def passing() -> Steps:
    return (yield)


def counting() -> Steps:
    try:
        part = yield
    finally:
        counting.__dict__["calls"] = counting.__dict__.get("calls", 0) + 1
    return part


def swallowing() -> Steps:
    try:
        return (yield)
    except Exception:
        return None


def swallowing_all_but_its_own() -> Steps:
    try:
        return (yield)
    except ExportError:
        raise
    except Exception:
        return None


def renaming() -> Steps:
    try:
        return (yield)
    except Exception as err:
        raise RuntimeError("somewhere in the backend") from err


def hiding() -> Steps:
    try:
        return (yield)
    except Exception as err:
        raise KeyError(str(err)) from None


def losing() -> Steps:
    yield


def replacing() -> Steps:
    yield
    return object()


def forgetting_capabilities() -> Steps:
    part = yield
    part.capabilities = frozenset({"figures"})
    return part


def breaking() -> Steps:
    part = yield

    def fail(metrics: Any, step: int) -> None:
        raise OSError("no upload today")

    part.log = fail
    return part


def make(function: Callable[[], Steps], hook: str = "log") -> object:
    """Return a plugin that wraps one hook with `function`."""
    wrapper = hookimpl(wrapper=True)(function)
    return type("Wrapper", (), {f"dovetail_{hook}": staticmethod(wrapper)})()


class Timing:
    """Wraps all hooks, as a plugin that times them does."""

    @hookimpl(wrapper=True)
    def dovetail_compile(self) -> Steps:
        return (yield)

    @hookimpl(wrapper=True)
    def dovetail_collate(self, task: Any) -> Steps:
        return (yield)

    @hookimpl(wrapper=True)
    def dovetail_accumulate(self, model: Any, optimizer: Any) -> Steps:
        return (yield)

    @hookimpl(wrapper=True)
    def dovetail_log(self, run: Any) -> Steps:
        return (yield)

    @hookimpl(wrapper=True)
    def dovetail_export(self, options: Any) -> Steps:
        return (yield)


def failures_of(plugin: object) -> dict[str, str]:
    """Run every check against a wrapper; return the reasons of those that fail."""
    return dict(type("Suite", (WrapperSuite,), {"plugin": plugin})().failures())


def test_a_wrapper_of_every_hook_passes_every_check() -> None:
    WrapperSuite.check(plugin=Timing())
    assert len(WrapperSuite.checks()) == 6
    suite = type("Suite", (WrapperSuite,), {"plugin": Timing()})()
    assert suite.hooks() == ["compile", "collate", "accumulate", "log", "export"]


@pytest.mark.parametrize("hook", ["compile", "collate", "accumulate", "log", "export"])
def test_a_wrapper_of_one_hook_passes_every_check(hook: str) -> None:
    before = counting.__dict__.get("calls", 0)
    WrapperSuite.check(plugin=make(counting, hook))
    assert counting.__dict__["calls"] > before  # it was called


@pytest.mark.parametrize(
    ("function", "checks"),
    [
        (swallowing, [ERRORS]),
        (swallowing_all_but_its_own, [ERRORS]),
        (renaming, [ERRORS]),
        (hiding, [ERRORS]),
        (losing, [HANDED_ON]),
        (replacing, [HANDED_ON]),
        (forgetting_capabilities, [WORK]),
        (breaking, [WORK]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_reported_by_its_check_alone(
    function: Callable[[], Steps], checks: list[str]
) -> None:
    failures = failures_of(make(function))
    assert list(failures) == checks, failures
    assert "dovetail_log" in failures[checks[0]]


@pytest.mark.parametrize("hook", ["compile", "collate", "accumulate", "export"])
def test_a_wrapper_that_answers_nothing_is_reported_around_every_hook(hook: str) -> None:
    failures = failures_of(make(losing, hook))
    assert list(failures) == [HANDED_ON]
    assert f"around dovetail_{hook}" in failures[HANDED_ON]
    assert "None" in failures[HANDED_ON]


def test_a_wrapper_that_swallows_is_told_so() -> None:
    with pytest.raises(ConformanceError, match=r"1 of 6 .*\n.*did not let it through"):
        WrapperSuite.check(plugin=make(swallowing))


class Meddling:
    """Wraps a hook, and changes what is next to it as soon as somebody looks at it."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, by: Callable[..., Any]) -> None:
        self._patch = patch
        self._name = name
        self._by = by

    @property
    def dovetail_api(self) -> int:
        plain = getattr(Registry, self._name)
        if not hasattr(plain, "is_meddled"):

            def changed(*arguments: Any, **named: Any) -> Any:
                return self._by(plain(*arguments, **named))

            changed.is_meddled = True  # type: ignore[attr-defined]
            self._patch.setattr(Registry, self._name, changed)
        return 1

    @hookimpl(wrapper=True)
    def dovetail_log(self) -> Steps:
        return (yield)


class Shadow:
    """Looks like a part, and is another object."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


@pytest.mark.parametrize(
    ("name", "by"),
    [("log", Shadow), ("chain", lambda plugins: [*plugins[:1], *plugins])],
)
def test_a_plugin_that_acts_without_being_named_is_reported(
    name: str, by: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = failures_of(Meddling(monkeypatch, name, by))
    assert UNNAMED in failures
    assert "unnamed, it" in failures[UNNAMED]
    # Whoever meddles with the list of what runs is in it twice, too.
    assert set(failures) <= {UNNAMED, TWICE}


def test_a_registry_that_wraps_twice_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Registry.chain

    def doubled(self: Registry, *arguments: Any) -> list[Any]:
        plugins = plain(self, *arguments)
        return [*plugins[:1], *plugins] if len(plugins) > 1 else plugins

    monkeypatch.setattr(Registry, "chain", doubled)
    assert list(failures_of(make(passing))) == [TWICE]


def test_a_registry_that_asks_twice_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Registry.log

    def doubled(self: Registry, *arguments: Any) -> Any:
        if self._wrappers:
            plain(self, *arguments)
        return plain(self, *arguments)

    monkeypatch.setattr(Registry, "log", doubled)
    assert list(failures_of(make(passing))) == [ONCE]
