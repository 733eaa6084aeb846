"""Conformance of plugins that wrap hooks: around a backend, and not in its way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dovetail._markers import HOOKS, HookName, hook_function
from dovetail.registry import Registry
from dovetail.testing.suite import ConformanceError, Suite, expect
from dovetail.testing.wrapper.references import (
    PlantedDovetailError,
    PlantedError,
    References,
    call_hook,
    use_part,
)

_BACKEND = "reference"
"""Name of the backend that is wrapped."""


class WrapperSuite(Suite):
    """Checks of a wrapper plugin, around the plainest backend of each hook that it wraps.

    What the wrapper does around a hook is its own affair; what is checked is that the run gets its
    part, or its error, all the same.
    """

    hook = "wrap"

    def test_every_part_is_handed_on(self) -> None:
        """The run gets a part that has all its methods, not `None` and nothing else."""
        for hook in self.hooks():
            with self._call(hook, (self.name,)) as call:
                try:
                    call()
                except Exception as err:
                    text = f"around {hook_function(hook)}: {_reason(err)}"
                    raise ConformanceError(text) from err

    def test_wrapped_parts_work(self) -> None:
        """A part answers as it does without the wrapper."""
        for hook in self.hooks():
            with self._call(hook, ()) as bare, tempfile.TemporaryDirectory() as folder:
                wanted = use_part(hook, bare(), Path(folder))
            with self._call(hook, (self.name,)) as call, tempfile.TemporaryDirectory() as folder:
                try:
                    part = call()
                except Exception:  # no part at all is another check's
                    continue
                try:
                    found = use_part(hook, part, Path(folder))
                except Exception as err:
                    text = f"around {hook_function(hook)}, the part fails: {_reason(err)}"
                    raise ConformanceError(text) from err
            where = f"around {hook_function(hook)}, the part answers"
            expect(found == wanted, f"{where} {found!r} instead of {wanted!r}")

    def test_the_backend_is_called_once(self) -> None:
        """Each call of the hook reaches the backend, and once."""
        for hook in self.hooks():
            backend = References()
            with self._call(hook, (self.name,), backend) as call:
                _ignore_errors(call)
            count = len(backend.answers)
            expect(count == 1, f"{hook_function(hook)} of the backend was called {count} times")

    def test_errors_pass_through(self) -> None:
        """What the backend raises reaches the run, of the same type and for the same reason."""
        for hook in self.hooks():
            for error in (PlantedError("planted"), PlantedDovetailError("planted")):
                backend = References(error)
                with self._call(hook, (), backend) as bare:
                    wanted = _error_of(bare)
                with self._call(hook, (self.name,), backend) as call:
                    found = _error_of(call)
                where = f"{hook_function(hook)} raised {type(error).__name__}, and"
                expect(found is not None, f"{where} the wrapper did not let it through")
                is_same = _types(found) == _types(wanted)
                text = f"{where} the run got {' from '.join(_types(found))}"
                expect(is_same, f"{text} instead of {' from '.join(_types(wanted))}")

    def test_it_does_not_act_unless_it_is_named(self) -> None:
        """Where `run.plugins` does not name it, the run gets the backend's own part."""
        for hook in self.hooks():
            backend = References()
            registry = self._around(backend)
            chain = [plugin.name for plugin in registry.chain(hook, _BACKEND)]
            expect(chain == [_BACKEND], f"unnamed, it takes part in {hook_function(hook)}: {chain}")
            with tempfile.TemporaryDirectory() as folder:
                part = call_hook(registry, hook, _BACKEND, Path(folder))
            is_own = len(backend.answers) == 1 and part is backend.answers[0]
            expect(is_own, f"unnamed, it changed what {hook_function(hook)} answers")

    def test_named_twice_it_wraps_once(self) -> None:
        """`run.plugins` may hold a name twice; the hook is wrapped once."""
        for hook in self.hooks():
            registry = self._around(References()).with_wrappers([self.name, self.name])
            chain = [plugin.name for plugin in registry.chain(hook, _BACKEND)]
            is_once = len(chain) == 2 and chain[-1] == _BACKEND
            expect(is_once, f"named twice, {hook_function(hook)} runs {', '.join(chain)}")

    def hooks(self) -> list[HookName]:
        """Return the hooks that the plugin wraps."""
        functions = self.registry().load("wrap", self.name).options_models
        return [hook for hook in HOOKS if hook_function(hook) in functions]

    def _around(self, backend: References) -> Registry:
        registry = self.registry()
        for hook in HOOKS:
            registry.register(backend, hook=hook, name=_BACKEND)
        return registry

    @contextmanager
    def _call(
        self, hook: HookName, wrappers: tuple[str, ...], backend: References | None = None
    ) -> Iterator[Any]:
        """Yield a function that calls a hook of the backend with wrappers around it."""
        registry = self._around(backend or References()).with_wrappers(wrappers)
        with tempfile.TemporaryDirectory(prefix="dovetail-") as folder:
            yield lambda: call_hook(registry, hook, _BACKEND, Path(folder))


def _error_of(call: Any) -> BaseException | None:
    try:
        call()
    except Exception as err:
        return None if _is_own(err) else err
    return None


def _is_own(error: Exception) -> bool:
    """Return whether the registry itself complains, of an answer where there was an error."""
    return error.__cause__ is None and not isinstance(error, PlantedDovetailError)


def _ignore_errors(call: Any) -> None:
    try:
        call()
    except Exception:
        return


def _types(error: BaseException | None) -> list[str]:
    """Return the types of an error and of what it came from."""
    if error is None:
        return []
    return [type(error).__name__, *_types(error.__cause__)]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
