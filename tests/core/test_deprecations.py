from __future__ import annotations

import types
import warnings

import pluggy
import pytest

from dovetail import __version__, deprecations, hookimpl
from dovetail._markers import PROJECT, hookspec
from dovetail.deprecations import MINOR_RELEASES, Deprecation, warnings_of
from dovetail.errors import DovetailDeprecationWarning
from dovetail.registry import Registry

OLD = Deprecation("0.3", "0.5", "Implement dovetail_log instead.")
EVERY = [
    *deprecations.HOOKS.items(),
    *((f"{f} {a}", d) for f, of in deprecations.ARGUMENTS.items() for a, d in of.items()),
]


def release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def specs(hooks: dict[str, Deprecation], arguments: dict[str, dict[str, Deprecation]]) -> object:
    def dovetail_report(run: object, options: object) -> None:
        """Report."""

    marks = warnings_of("dovetail_report", hooks, arguments)
    return types.SimpleNamespace(
        dovetail_report=hookspec(firstresult=True, **marks)(dovetail_report)
    )


class Reporter:
    @hookimpl
    def dovetail_report(self, options: object) -> None: ...


@pytest.mark.parametrize(
    ("hooks", "arguments", "shown"),
    [
        ({"dovetail_report": OLD}, {}, "the hook dovetail_report is deprecated since dovetail 0.3"),
        (
            {},
            {"dovetail_report": {"options": OLD}},
            "the argument options of dovetail_report is deprecated since dovetail 0.3",
        ),
    ],
)
def test_who_implements_what_is_deprecated_is_warned_where_it_stands(
    hooks: dict[str, Deprecation], arguments: dict[str, dict[str, Deprecation]], shown: str
) -> None:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs(hooks, arguments))
    with pytest.warns(DovetailDeprecationWarning) as caught:
        manager.register(Reporter())
    (warning,) = caught
    assert str(warning.message).startswith(shown)
    assert str(warning.message).endswith(" and goes in 0.5. Implement dovetail_log instead.")
    assert warning.filename == __file__


def test_an_argument_that_is_not_taken_warns_nobody() -> None:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs({}, {"dovetail_report": {"run": OLD}}))
    manager.register(Reporter())


@pytest.mark.parametrize(("what", "deprecation"), EVERY)
def test_deprecation_warns_for_two_minor_releases_and_is_not_overdue(
    what: str, deprecation: Deprecation
) -> None:
    since, removed = release(deprecation.since), release(deprecation.removed_in)
    assert removed[0] > since[0] or removed[1] - since[1] >= MINOR_RELEASES, what
    assert release(__version__) < removed, f"{what}: remove it, and raise API_VERSION"
    assert deprecation.instead.endswith(".")


def test_a_call_warns_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from dovetail import hookspecs

    spec = hookspecs.dovetail_log.dovetail_spec  # type: ignore[attr-defined]
    monkeypatch.setitem(spec, "warn_on_impl", OLD.warning("the hook dovetail_log"))

    class Logger:
        @hookimpl
        def dovetail_log(self) -> None: ...

    registry = Registry()
    with pytest.warns(DovetailDeprecationWarning, match="the hook dovetail_log is deprecated"):
        registry.register(Logger(), hook="log", name="old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match="answered None"):
            registry.log("old", None, None)  # type: ignore[arg-type]
