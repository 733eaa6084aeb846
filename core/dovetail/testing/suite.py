"""The base of the conformance suites: how a backend is found, built and checked."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

from dovetail.config import PluginOptions
from dovetail.errors import DovetailError, build_message
from dovetail.registry import Registry, Role
from dovetail.task import TaskSpec

_PREFIX = "test_"


class ConformanceError(AssertionError):
    """A backend does not keep the contract of its hook."""


def expect(condition: bool, message: str) -> None:
    """Raise unless a condition holds.

    Raises:
        ConformanceError: It does not.
    """
    # Not an `assert`: the suite must work under -O, and outside pytest, which rewrites those.
    if not condition:
        raise ConformanceError(message)


@contextmanager
def reported_by(check: str) -> Iterator[None]:
    """Skip a check whose precondition fails, where another check reports just that.

    One fault then makes one failure, which says what is wrong.

    Args:
        check: Name of the check that reports it.

    Raises:
        unittest.SkipTest: Something was raised inside.
    """
    try:
        yield
    except unittest.SkipTest:
        raise
    except Exception as err:
        raise unittest.SkipTest(f"cannot be checked, see {check}: {err}") from err


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every random generator, and give them their states back at the end."""
    from dovetail.run.checkpoint import random_state, seed_everything, set_random_state

    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


class Suite:
    """The checks of one hook. A subclass says which backend is checked, and on what.

    Every method named `test_…` is a check. It takes no arguments, so that it runs with pytest and
    without.
    """

    hook: ClassVar[Role]
    """The hook, or "wrap"; each suite sets its own."""
    backend: str = ""
    """Name of an installed backend, also `distribution:name`."""
    plugin: object = None
    """The plugin itself, a module or an instance, where it is not installed."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Its options, as the config's table would hold them."""
    task: TaskSpec = TaskSpec()
    """The task it is built for."""
    _registry: Registry | None = None

    @classmethod
    def check(cls, **attributes: Any) -> None:
        """Run every check, for use without pytest.

        Args:
            attributes: What a subclass would set: `backend`, `options`, and what the suite needs.

        Raises:
            ConformanceError: Checks failed; the message holds each with its reason.
            TypeError: The suite knows no such attribute.
        """
        unknown = sorted(name for name in attributes if not hasattr(cls, name))
        if unknown:
            raise TypeError(f"{cls.__name__} has no attribute {', '.join(unknown)}")
        suite = type(cls.__name__, (cls,), attributes)()
        failures = [f"{name}: {reason}" for name, reason in suite.failures()]
        if failures:
            head = f"{suite.name}: {len(failures)} of {len(suite.checks())} checks failed"
            raise ConformanceError("\n".join([head, *(f"  - {text}" for text in failures)]))

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of the checks."""
        functions = inspect.getmembers(cls, inspect.isroutine)
        return [name for name, _ in functions if name.startswith(_PREFIX)]

    def failures(self) -> Iterator[tuple[str, str]]:
        """Run every check; yield name and reason of each that fails."""
        for name in self.checks():
            try:
                getattr(self, name)()
            except unittest.SkipTest:
                continue
            except Exception as err:
                reason = str(err) if isinstance(err, ConformanceError) else ""
                yield name.removeprefix(_PREFIX), reason or f"{type(err).__name__}: {err}"

    @property
    def name(self) -> str:
        """The backend's name in messages and in the registry."""
        return self.backend or "under-test"

    @property
    def where(self) -> str:
        """How messages name what is checked."""
        function = "" if self.hook == "wrap" else f" hook dovetail_{self.hook}"
        return f"plugin {self.name!r}{function}"

    def registry(self) -> Registry:
        """Return a registry that knows the backend.

        Raises:
            ConformanceError: The suite names no backend, or the plugin breaks the contract.
        """
        if not self.backend and self.plugin is None:
            found = "names no backend"
            hint = 'Set backend = "<name>", or plugin = <module>.'
            raise ConformanceError(build_message(type(self).__name__, found, action=hint))
        if self._registry is None:
            # Kept: every look at what is installed costs more than a check.
            self._registry = self._make_registry()
        return self._registry

    def _make_registry(self) -> Registry:
        registry = Registry()
        if self.plugin is not None:
            try:
                registry.register(self.plugin, hook=self.hook, name=self.name)
            except DovetailError as err:
                raise ConformanceError(str(err)) from err
        return registry

    def build_options(self, registry: Registry) -> PluginOptions:
        """Validate `options` as a run would."""
        if self.hook == "wrap":
            return PluginOptions()
        return registry.build_options(self.hook, self.name, self.options)
