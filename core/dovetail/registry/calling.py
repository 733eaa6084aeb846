"""The registry: chooses backends by name and calls their hooks, one typed method each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dovetail._markers import HOOKS, HookName, hook_function
from dovetail.config import PluginOptions, explain
from dovetail.errors import (
    BrokenPluginError,
    ConfigError,
    DovetailError,
    PluginConflictError,
    PluginError,
    UnknownPluginError,
    build_message,
    did_you_mean,
    join_problems,
)
from dovetail.registry.listing import (
    RESERVED,
    ROLES,
    PluginInfo,
    Role,
    list_entry_points,
    sort_plugins,
)
from dovetail.registry.loading import (
    Backend,
    import_plugin,
    load_backend,
    missing_dependency,
    new_manager,
)
from dovetail.registry.lock import lock_row

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from dovetail.task import TaskSpec
    from dovetail.types import Accumulator, Collator, Exporter, RunInfo, Tracker

_SESSION = "this session"


class Registry:
    """Every plugin that can be named, and the only caller of hooks.

    Installed plugins are listed from their entry points and imported when they are named. A call
    builds a chain of exactly what was named: the wrappers and one backend; what else is installed
    takes no part.

    Args:
        wrappers: Wrapper plugins around every hook, the first outermost.
    """

    def __init__(self, wrappers: Sequence[str] = ()) -> None:
        self._wrappers = tuple(wrappers)
        self._installed: list[PluginInfo] | None = None
        self._registered: dict[PluginInfo, object] = {}
        self._loaded: dict[PluginInfo, Backend] = {}

    def with_wrappers(self, wrappers: Sequence[str]) -> Registry:
        """Return a registry of the same plugins with `wrappers` around every hook."""
        other = Registry(wrappers)
        other._installed, other._registered = self._installed, self._registered
        other._loaded = self._loaded
        return other

    def register(self, plugin: object, *, hook: Role, name: str) -> None:
        """Add a plugin of this session, for scripts and notebooks.

        Args:
            plugin: A module or an instance with hookimpls.
            hook: The hook it implements, or "wrap".
            name: The name it is chosen by; an earlier one of this session is replaced.

        Raises:
            BrokenPluginError: It does not keep the contract of the hook.
            ConfigError: There is no such hook.
        """
        if hook not in ROLES:
            expected = f"one of {', '.join(ROLES)}"
            raise ConfigError(build_message("argument hook", f"got {hook!r}", expected))
        if name in RESERVED:
            found = f"got {name!r}, which has a meaning of its own in a config"
            raise ConfigError(build_message("argument name", found, "another name"))
        info = PluginInfo(hook, name, _SESSION, "", type(plugin).__name__)
        backend = load_backend(info, plugin)
        for other in [p for p in self._registered if (p.role, p.name) == (hook, name)]:
            del self._registered[other]
        self._loaded[info] = backend
        self._registered[info] = plugin

    def list_plugins(self, role: Role | None = None) -> list[PluginInfo]:
        """Return all plugins, or those of one role, without importing any."""
        if self._installed is None:
            self._installed = list_entry_points()
        everyone = sort_plugins([*self._registered, *self._installed])
        return [p for p in everyone if role is None or p.role == role]

    def find(self, role: Role, name: str) -> PluginInfo:
        """Return the plugin that `name`, plain or as `distribution:name`, means.

        Raises:
            UnknownPluginError: There is none; the message lists the choices and the nearest.
            PluginConflictError: Two distributions offer the name.
        """
        candidates = self.list_plugins(role)
        matches = [p for p in candidates if p.is_named(name)]
        session = [p for p in matches if p in self._registered]
        if session:
            return session[0]
        if len(matches) == 1:
            return matches[0]
        where = "config run.plugins" if role == "wrap" else f"config {role}.use"
        if not matches:
            choices = [p.name for p in candidates]
            expected = f"one of {', '.join(dict.fromkeys(choices)) or '(none is installed)'}"
            hint = did_you_mean(name, choices) or self._elsewhere(name)
            hint = hint or f"Install a plugin that offers it; `dovetail plugins {role}` lists them."
            found = f"no plugin is called {name!r}"
            raise UnknownPluginError(build_message(where, found, expected, hint))
        owners = [f"{p.distribution} {p.version}" for p in matches]
        choice = " or ".join(f'"{p.distribution}:{p.name}"' for p in matches)
        found = f"{name!r} is offered by {' and by '.join(owners)}"
        raise PluginConflictError(build_message(where, found, "one of them", f"Write {choice}."))

    def _elsewhere(self, name: str) -> str:
        roles = [p.role for p in self.list_plugins() if p.is_named(name)]
        if roles[:1] == ["wrap"]:
            return f"{name!r} wraps hooks: name it in run.plugins."
        return f"{name!r} is a plugin of the {roles[0]} hook." if roles else ""

    def load(self, role: Role, name: str) -> Backend:
        """Import and check the plugin that `name` means.

        Raises:
            PluginError: It is unknown, ambiguous or broken.
        """
        info = self.find(role, name)
        if info not in self._loaded:
            self._loaded[info] = load_backend(info, import_plugin(info))
        return self._loaded[info]

    def build_options(
        self, hook: HookName, name: str, table: Mapping[str, Any], config_dir: Path | None = None
    ) -> PluginOptions:
        """Validate a config table into the options of a backend.

        Args:
            hook: The hook.
            name: The backend.
            table: The table `[hook.name]`.
            config_dir: Folder that relative paths in it are meant from.

        Raises:
            ConfigError: Options are unknown or do not fit; all of them in one message.
            PluginError: The backend is unknown, ambiguous or broken.
        """
        backend = self.load(hook, name)
        model = backend.options_model(hook)
        where = f"config {hook}.{backend.info.name}"
        try:
            return model.model_validate(dict(table), context={"config_dir": config_dir})
        except ValidationError as err:
            problems = explain(err, model, where)
            raise ConfigError(join_problems(where, problems), problems) from err
        except DovetailError:
            raise
        except Exception as err:  # a validator of the plugin's own
            found = f"its options {dict(table)!r} raised {type(err).__name__}: {err}"
            raise PluginError(build_message(backend.info.where, found)) from err

    def compile(self, name: str, model: nn.Module, task: TaskSpec, options: Any) -> nn.Module:
        """Call `dovetail_compile` of one backend."""
        from torch import nn

        arguments = {"model": model, "task": task, "options": options}
        part: nn.Module = self._call("compile", name, arguments, nn.Module)
        return part

    def collate(self, name: str, task: TaskSpec, options: Any) -> Collator:
        """Call `dovetail_collate` of one backend."""
        from dovetail.types import Collator

        part: Collator = self._call(
            "collate", name, {"task": task, "options": options}, Collator, task.modality
        )
        return part

    def accumulate(
        self,
        name: str,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        options: Any,
    ) -> Accumulator:
        """Call `dovetail_accumulate` of one backend."""
        from dovetail.types import Accumulator

        arguments = {"model": model, "optimizer": optimizer, "scaler": scaler, "options": options}
        part: Accumulator = self._call("accumulate", name, arguments, Accumulator)
        return part

    def log(self, name: str, run: RunInfo, options: Any) -> Tracker:
        """Call `dovetail_log` of one backend."""
        from dovetail.types import Tracker

        part: Tracker = self._call("log", name, {"run": run, "options": options}, Tracker)
        return part

    def export(self, name: str, task: TaskSpec, options: Any) -> Exporter:
        """Call `dovetail_export` of one backend."""
        from dovetail.types import Exporter

        part: Exporter = self._call("export", name, {"task": task, "options": options}, Exporter)
        return part

    def find_collator(
        self, task: TaskSpec, tables: Mapping[str, Mapping[str, Any]], config_dir: Path | None
    ) -> tuple[str, PluginOptions]:
        """Find the collator for `collate.use = "auto"`.

        Args:
            task: The task; a backend named like its modality is taken.
            tables: The options tables of the collate section.
            config_dir: Folder that relative paths in them are meant from.

        Returns:
            Name and options of the backend.

        Raises:
            UnknownPluginError: Nobody claims the modality, or several do.
        """
        installed = [p for p in self.list_plugins("collate") if not p.is_reserved]
        names = [p.name for p in installed]
        if task.modality in names:
            name = task.modality
            return name, self.build_options("collate", name, tables.get(name, {}), config_dir)
        claims: list[tuple[str, PluginOptions]] = []
        failures: list[str] = []
        for name in dict.fromkeys(names):
            try:
                options = self.build_options("collate", name, tables.get(name, {}), config_dir)
                arguments = {"task": task, "options": options}
                if self._chain("collate", self.load("collate", name), arguments) is not None:
                    claims.append((name, options))
            except DovetailError as err:
                failures.append(f"{name} ({err})")
        if len(claims) == 1:
            return claims[0]
        found = f"Unsupported modality: {task.modality}"
        if claims:
            found = f"modality {task.modality!r} is claimed by {', '.join(n for n, _ in claims)}"
        expected = f"a modality one of the installed collators claims: {', '.join(names)}"
        hint = f"Could not be asked: {'; '.join(failures)}." if failures else ""
        hint = hint or "Set collate.use to one of them, or install a collator for it."
        raise UnknownPluginError(build_message("config task.modality", found, expected, hint))

    def chain_names(self, hook: HookName, name: str) -> list[str]:
        """Return what a call would run, the outermost wrapper first, the backend last."""
        function = hook_function(hook)
        around = [w.info.name for w in self._load_wrappers() if function in w.options_models]
        return [*around, self.load(hook, name).info.name]

    def _call(
        self, hook: HookName, name: str, arguments: dict[str, Any], kind: type, asked: str = ""
    ) -> Any:
        backend = self.load(hook, name)
        part = self._chain(hook, backend, arguments)
        where = f"{backend.info.where} hook {hook_function(hook)}"
        if part is None:
            found = "answered None" + (f" for the modality {asked!r}" if asked else "")
            hint = f"Choose another backend: {hook}.use."
            raise PluginError(build_message(where, found, _article(kind), hint))
        if not isinstance(part, kind):
            lacking = [m for m in _members(kind) if not hasattr(part, m)]
            found = f"answered a {type(part).__name__}"
            found += f" without {', '.join(lacking)}" if lacking else ""
            raise BrokenPluginError(build_message(where, found, _article(kind)))
        return part

    def _chain(self, hook: HookName, backend: Backend, arguments: dict[str, Any]) -> Any:
        """Call one backend with the wrappers around it; name whoever raises."""
        manager = new_manager()
        manager.register(backend.plugin, name=backend.info.name)
        # pluggy calls what was registered last first, so that the first named ends up outermost.
        wrappers = self._load_wrappers()
        for wrapper in reversed(wrappers):
            manager.register(wrapper.plugin, name=f"wrap:{wrapper.info.name}")
        try:
            return getattr(manager.hook, hook_function(hook))(**arguments)
        except DovetailError:
            raise
        except ModuleNotFoundError as err:
            raise missing_dependency(backend.info, err) from err
        except (Exception, SystemExit) as err:
            where = f"{backend.info.where} hook {hook_function(hook)}"
            found = f"raised {type(err).__name__}: {err}"
            if wrappers:
                found += f" (wrapped by {', '.join(w.info.name for w in wrappers)})"
            raise PluginError(build_message(where, found)) from err

    def _load_wrappers(self) -> list[Backend]:
        """Return the wrappers, the first outermost; one that is named twice wraps once."""
        loaded: dict[int, Backend] = {}
        for name in self._wrappers:
            backend = self.load("wrap", name)
            loaded.setdefault(id(backend.plugin), backend)
        return list(loaded.values())

    def lock(self, chosen: Mapping[HookName, Mapping[str, PluginOptions]]) -> list[dict[str, str]]:
        """Return what stands in `plugins.lock.json`: one row per chosen backend and wrapper."""
        rows = [
            lock_row(self.load(hook, name).info, options)
            for hook in HOOKS
            for name, options in chosen.get(hook, {}).items()
        ]
        return rows + [lock_row(wrapper.info, None) for wrapper in self._load_wrappers()]


def _article(kind: type) -> str:
    return f"an {kind.__name__}" if kind.__name__[0] in "AEIOU" else f"a {kind.__name__}"


def _members(kind: type) -> list[str]:
    """Return the public members of a protocol; a class has too many to be listed."""
    if not getattr(kind, "_is_protocol", False):
        return []
    return sorted(n for n in vars(kind) if not n.startswith("_") or n == "__call__")
