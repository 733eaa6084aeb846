"""One hook call: the wrappers, one backend, and who of them failed or took how long."""

from __future__ import annotations

import functools
import itertools
import time
import types
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dovetail._markers import PROJECT, HookName, hook_function
from dovetail.errors import (
    DovetailDeprecationWarning,
    DovetailError,
    PluginError,
    build_message,
)
from dovetail.registry.listing import PluginInfo
from dovetail.registry.loading import Backend, missing_dependency, new_manager
from dovetail.registry.places import place_of_error


@dataclass
class PluginCall:
    """What one plugin did in one hook call."""

    info: PluginInfo
    duration_s: float = 0.0
    """Seconds in its own code; what it wraps does not count."""
    result: str = ""
    """Type of what it answered."""


@dataclass
class HookCall:
    """One call of a hook, as it went."""

    hook: HookName
    calls: list[PluginCall] = field(default_factory=list)
    """The plugins, the outermost wrapper first, the backend last."""


def call_chain(
    hook: HookName,
    backend: Backend,
    wrappers: Sequence[Backend],
    arguments: Mapping[str, Any],
) -> tuple[Any, HookCall]:
    """Call one backend with the wrappers around it.

    Args:
        hook: The hook.
        backend: Who answers.
        wrappers: Around it, the first outermost; those that do not wrap this hook are left out.
        arguments: Arguments of the hook, by name.

    Returns:
        The answer, and how the call went.

    Raises:
        PluginError: One of them raised; it names which. What a plugin raises on purpose, an error
            of dovetail, comes through as it is.
    """
    function = hook_function(hook)
    around = [w for w in wrappers if function in w.options_models]
    record = HookCall(hook)
    culprits: list[tuple[BaseException, PluginInfo]] = []
    manager = new_manager()
    with warnings.catch_warnings():
        # Whoever uses what is deprecated was told when it was loaded.
        warnings.simplefilter("ignore", DovetailDeprecationWarning)
        # pluggy calls what was registered last first, so that the first named ends up outermost.
        for member in [backend, *reversed(around)]:
            call = PluginCall(member.info)
            record.calls.insert(0, call)
            guarded = _guard(getattr(member.plugin, function), call, culprits)
            manager.register(types.SimpleNamespace(**{function: guarded}), name=str(id(call)))
    try:
        answer = getattr(manager.hook, function)(**arguments)
    except (Exception, SystemExit) as err:
        raiser = next((info for e, info in culprits if e is err), backend.info)
        _report(err, raiser, function)
    # Each was timed with all that it wraps.
    for outer, inner in itertools.pairwise(record.calls):
        outer.duration_s -= inner.duration_s
    return answer, record


def _report(err: BaseException, info: PluginInfo, function: str) -> NoReturn:
    if isinstance(err, DovetailError):
        raise err
    if isinstance(err, ModuleNotFoundError):
        raise missing_dependency(info, err) from err
    found = f"raised {type(err).__name__}: {err}{place_of_error(err, info.value)}"
    raise PluginError(build_message(f"{info.where} hook {function}", found)) from err


def _guard(
    function: Callable[..., Any],
    call: PluginCall,
    culprits: list[tuple[BaseException, PluginInfo]],
) -> Callable[..., Any]:
    """Return `function`, watched: how long it takes, and whether it is the one that raises."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Generator[None, Any, Any]:
        with _watch(call, culprits):
            result = yield from _yield_once(function(*arguments))
            call.result = type(result).__name__
            return result

    @functools.wraps(function)
    def backend(*arguments: Any) -> Any:
        with _watch(call, culprits):
            result = function(*arguments)
            call.result = type(result).__name__
            return result

    return wrapper if getattr(function, f"{PROJECT}_impl")["wrapper"] else backend


@contextmanager
def _watch(call: PluginCall, culprits: list[tuple[BaseException, PluginInfo]]) -> Iterator[None]:
    start_s = time.perf_counter()
    try:
        yield
    except BaseException as err:
        # Whoever it passes on its way out is not to blame.
        if not any(known is err for known, _ in culprits):
            culprits.append((err, call.info))
        raise
    finally:
        call.duration_s = time.perf_counter() - start_s


def _yield_once(steps: Generator[None, Any, Any]) -> Generator[None, Any, Any]:
    """Run a wrapper, which must yield once; what it wraps runs at that point."""
    try:
        next(steps)
    except StopIteration:
        raise RuntimeError("the wrapper does not yield") from None
    try:
        received = yield
    except BaseException as err:
        resume = functools.partial(steps.throw, err)
    else:
        resume = functools.partial(steps.send, received)
    try:
        resume()
    except StopIteration as done:
        return done.value
    raise RuntimeError("the wrapper yields more than once")
