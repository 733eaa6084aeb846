"""Imports one plugin and checks that it keeps the contract of its hook."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pluggy

from dovetail import hookspecs
from dovetail._markers import (
    API_VERSION,
    HOOKS,
    OLDEST_API_VERSION,
    PROJECT,
    WRAPPER_GROUP,
    HookName,
    hook_function,
)
from dovetail.config import PluginOptions
from dovetail.errors import (
    BrokenPluginError,
    MissingDependencyError,
    PluginError,
    build_message,
    did_you_mean,
)
from dovetail.registry.listing import PluginInfo, distribution_of, extra_for
from dovetail.registry.places import place_of, place_of_error

_FUNCTIONS = tuple(hook_function(hook) for hook in HOOKS)


@dataclass(frozen=True)
class Backend:
    """A plugin that was imported and checked."""

    info: PluginInfo
    plugin: object
    options_models: dict[str, type[PluginOptions]]
    """Options model of each hook function it implements."""
    summary: str
    """First line of its documentation."""
    before: tuple[str, ...] = ()
    """Wrappers that this one must be around (`dovetail_before`)."""
    after: tuple[str, ...] = ()
    """Wrappers that must be around this one (`dovetail_after`)."""

    def options_model(self, hook: HookName) -> type[PluginOptions]:
        """Return the options model of its implementation of `hook`."""
        return self.options_models[hook_function(hook)]


def import_plugin(info: PluginInfo) -> object:
    """Import the object an entry point names.

    Raises:
        MissingDependencyError: It needs a package that is not installed.
        BrokenPluginError: It raises while it is imported, or names nothing.
    """
    module_name, _, attribute = info.value.partition(":")
    try:
        plugin: object = importlib.import_module(module_name.strip())
        for part in attribute.split("[")[0].strip().split(".") if attribute else ():
            plugin = getattr(plugin, part)
    except ModuleNotFoundError as err:
        if err.name is not None and f"{module_name.strip()}.".startswith(f"{err.name}."):
            found = f"its entry point names {info.value}, and there is no module {err.name!r}"
            hint = f"Install it again: pip install --force-reinstall {info.distribution}"
            raise BrokenPluginError(build_message(info.where, found, action=hint)) from err
        raise missing_dependency(info, err) from err
    except KeyboardInterrupt:
        raise
    except BaseException as err:  # a plugin may even call sys.exit while it is imported
        place = place_of_error(err, info.value)
        found = f"{info.value} does not import: {type(err).__name__}: {err}{place}"
        hint = f"Mend or remove it: pip uninstall {info.distribution}"
        raise BrokenPluginError(build_message(info.where, found, action=hint)) from err
    return plugin


def missing_dependency(info: PluginInfo, err: ModuleNotFoundError) -> PluginError:
    """Return the error that names the missing package and the line that installs it."""
    package = (err.name or "").partition(".")[0] or str(err)
    # A namespace package is there without a file, and says nothing about what is installed.
    if package != err.name and getattr(sys.modules.get(package), "__file__", None):
        found = f"needs {err.name!r}, which the installed {package!r} does not have"
        hint = f"Install another version of {distribution_of(package)}."
        return BrokenPluginError(build_message(info.where, found, action=hint))
    extra = extra_for(info.distribution, package)
    target = f'"{info.distribution}[{extra}]"' if extra else distribution_of(package)
    found = f"needs the package {package!r}, which is not installed"
    hint = f"Install it: pip install {target}"
    return MissingDependencyError(build_message(info.where, found, action=hint))


def load_backend(info: PluginInfo, plugin: object) -> Backend:
    """Check an imported plugin against the contract.

    Args:
        info: Where it comes from.
        plugin: A module or an instance with hookimpls.

    Raises:
        BrokenPluginError: It was written for another API, has an undecorated or misspelt hook
            function, takes an argument the hook does not have, has an options annotation that is
            no options model, or does not implement its hook.
    """
    _check_api(info, plugin)
    if isinstance(plugin, type):
        found = f"{info.value} is a class{place_of(plugin)}"
        hint = "Make an instance in its module and name that."
        raise BrokenPluginError(build_message(info.where, found, "a module or an instance", hint))
    functions = dict(_hook_functions(info, plugin))
    manager = new_manager()
    try:
        manager.register(plugin, name=info.name)
        manager.check_pending()
    except pluggy.PluginValidationError as err:
        found = str(err).replace("\n", "; ")
        expected = f"a subset of the arguments that {PROJECT}.hookspecs declares"
        raise BrokenPluginError(build_message(info.where, found, expected)) from err
    _check_role(info, functions)
    models = {name: _options_model(info, name, function) for name, function in functions.items()}
    doc = inspect.getdoc(plugin) or ""
    before, after = (_wished_order(info, plugin, word) for word in ("before", "after"))
    return Backend(info, plugin, models, doc.strip().split("\n")[0], before, after)


def new_manager() -> pluggy.PluginManager:
    """Return a manager that knows the five contracts and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _wished_order(info: PluginInfo, plugin: object, word: str) -> tuple[str, ...]:
    attribute = f"{PROJECT}_{word}"
    names = getattr(plugin, attribute, ())
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        found = f"{attribute} is {names!r}{place_of(plugin)}"
        raise BrokenPluginError(build_message(info.where, found, "a tuple of wrappers' names"))
    return tuple(names)


def _check_api(info: PluginInfo, plugin: object) -> None:
    api = getattr(plugin, f"{PROJECT}_api", API_VERSION)
    if isinstance(api, bool) or not isinstance(api, int) or api < 1:
        found = f"{PROJECT}_api is {api!r}{place_of(plugin)}"
        raise BrokenPluginError(build_message(info.where, found, f"an integer <= {API_VERSION}"))
    written = f"was written for API {api} of {PROJECT}"
    if api > API_VERSION:
        found = f"{written}; this {PROJECT} has {API_VERSION}"
        hint = f"Install a newer {PROJECT} (pip install --upgrade {PROJECT}) or an older plugin."
        raise BrokenPluginError(build_message(info.where, found, action=hint))
    if api < OLDEST_API_VERSION:
        found = f"{written}; this {PROJECT} takes {OLDEST_API_VERSION} to {API_VERSION}"
        hint = f"Install a newer plugin: pip install --upgrade {info.distribution}"
        raise BrokenPluginError(build_message(info.where, found, action=hint))


def _hook_functions(info: PluginInfo, plugin: object) -> Iterator[tuple[str, Any]]:
    for name in dir(plugin):
        function = getattr(plugin, name, None)
        is_marked = hasattr(function, f"{PROJECT}_impl")
        if not inspect.isroutine(function) or not (is_marked or name.startswith(f"{PROJECT}_")):
            continue
        where = f"{info.where} {name}{place_of(function)}"
        if name not in _FUNCTIONS:
            expected = f"one of {', '.join(_FUNCTIONS)}"
            hint = did_you_mean(name, _FUNCTIONS)
            raise BrokenPluginError(build_message(where, "is no hook", expected, hint))
        if not is_marked:
            hint = (
                f"Write @{PROJECT}.hookimpl above it; without, it would silently never be called."
            )
            raise BrokenPluginError(build_message(where, "is not decorated", action=hint))
        _check_parameters(where, name, function)
        yield name, function


def _check_parameters(where: str, name: str, function: Any) -> None:
    """Refuse parameters that the hook does not have, or that pluggy silently never fills."""
    known = list(inspect.signature(getattr(hookspecs, name)).parameters)
    for parameter in _signature(function).parameters.values():
        is_plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_plain and parameter.name not in known:
            found = f"has the parameter {parameter.name!r}"
            expected = f"some of {', '.join(known)}"
            hint = did_you_mean(parameter.name, known)
            raise BrokenPluginError(build_message(where, found, expected, hint))
        if is_plain and parameter.default is parameter.empty:
            continue
        found = f"has the parameter `{parameter}`, which would never get a value"
        expected = "plain parameters without defaults"
        raise BrokenPluginError(build_message(where, found, expected))


def _check_role(info: PluginInfo, functions: dict[str, Any]) -> None:
    if info.role == "wrap":
        plain = [n for n, f in functions.items() if not getattr(f, f"{PROJECT}_impl")["wrapper"]]
        if plain or not functions:
            found = f"{', '.join(plain) or 'it'} wraps no hook"
            expected = f"functions marked @hookimpl(wrapper=True) in the group {WRAPPER_GROUP}"
            raise BrokenPluginError(build_message(info.where, found, expected))
        return
    wanted = hook_function(info.role)
    if wanted in functions and getattr(functions[wanted], f"{PROJECT}_impl")["wrapper"]:
        found = f"{wanted} is a wrapper, which makes no part of its own"
        hint = f"Declare it in the group {WRAPPER_GROUP} and name it in run.plugins."
        raise BrokenPluginError(build_message(info.where, found, action=hint))
    if wanted not in functions:
        found = f"has no {wanted}" + (f", only {', '.join(functions)}" if functions else "")
        expected = f"a function {wanted} marked with @hookimpl"
        raise BrokenPluginError(build_message(info.where, found, expected))


def _options_model(info: PluginInfo, name: str, function: Any) -> type[PluginOptions]:
    target = inspect.unwrap(function)
    annotation = _signature(target).parameters.get("options")
    model: Any = annotation.annotation if annotation is not None else inspect.Parameter.empty
    where = f"{info.where} hook {name}{place_of(function)}"
    if isinstance(model, str):
        # Only this annotation is evaluated: the others may name types for type checkers only.
        try:
            model = eval(model, getattr(target, "__globals__", {}))
        except Exception as err:
            found = f"the annotation of options, {model!r}, cannot be resolved: {err}"
            hint = "Define the options model at the top of the module, outside TYPE_CHECKING."
            raise BrokenPluginError(build_message(where, found, action=hint)) from err
    if model is inspect.Parameter.empty or model is Any:
        return PluginOptions
    if not (isinstance(model, type) and issubclass(model, PluginOptions)):
        found = f"options is annotated with {model!r}"
        raise BrokenPluginError(
            build_message(where, found, f"a subclass of {PROJECT}.PluginOptions")
        )
    return model


def _signature(function: Any) -> inspect.Signature:
    """Return a signature whose annotations need not all be there: they may be for checkers only."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)
