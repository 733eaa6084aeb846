"""The registry: chooses backends by name and calls their hooks, one typed method each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dovetail._markers import HOOKS, PROJECT, HookName, hook_function
from dovetail.config import PluginOptions, explain
from dovetail.errors import (
    ConfigError,
    DovetailError,
    PluginError,
    UnknownPluginError,
    build_message,
    join_problems,
)
from dovetail.registry.admission import Admission, read_environment
from dovetail.registry.chain import HookCall, call_chain
from dovetail.registry.finding import find_plugin
from dovetail.registry.listing import (
    RESERVED,
    ROLES,
    SESSION,
    PluginInfo,
    Role,
    list_entry_points,
    sort_plugins,
)
from dovetail.registry.loading import Backend, import_plugin, load_backend
from dovetail.registry.lock import core_row, lock_row
from dovetail.registry.ordering import order_wrappers
from dovetail.registry.parts import check_keys, check_part, with_article

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from dovetail.task import TaskSpec
    from dovetail.types import Accumulator, Collator, Exporter, RunInfo, Tracker


class Registry:
    """Every plugin that can be named, and the only caller of hooks.

    Installed plugins are listed from their entry points and imported when they are named. A call
    builds a chain of exactly what was named: the wrappers and one backend; what else is installed
    takes no part.

    Args:
        wrappers: Wrapper plugins around every hook, the first outermost.
        admission: Which distributions may offer plugins; what it leaves open, the environment
            variables `DOVETAIL_PLUGIN_AUTOLOAD` and `DOVETAIL_PLUGIN_ALLOW` decide.

    Attributes:
        history: Every hook call so far, as it went.
    """

    def __init__(self, wrappers: Sequence[str] = (), admission: Admission | None = None) -> None:
        self.history: list[HookCall] = []
        self._wrappers = tuple(wrappers)
        self._own_admission = admission or Admission()
        self._admission = self._own_admission.over(read_environment())
        self._installed: list[PluginInfo] | None = None
        self._registered: dict[PluginInfo, object] = {}
        self._loaded: dict[PluginInfo, Backend] = {}

    @property
    def wrappers(self) -> tuple[str, ...]:
        """Wrapper plugins around every hook, as they were named."""
        return self._wrappers

    @property
    def admission(self) -> Admission:
        """Which distributions may offer plugins."""
        return self._admission

    def with_wrappers(
        self, wrappers: Sequence[str], admission: Admission | None = None
    ) -> Registry:
        """Return a registry of the same plugins with `wrappers` around every hook.

        Args:
            wrappers: In place of those of this registry.
            admission: What a config says; it decides what nobody else did.
        """
        other = Registry(wrappers, self._own_admission)
        other._admission = other._admission.over(admission or Admission())
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
        info = PluginInfo(hook, name, SESSION, "", type(plugin).__name__)
        backend = load_backend(info, plugin)
        for other in [p for p in self._registered if (p.role, p.name) == (hook, name)]:
            del self._registered[other]
        self._loaded[info] = backend
        self._registered[info] = plugin

    def list_plugins(self, role: Role | None = None) -> list[PluginInfo]:
        """Return the plugins that may be seen, or those of one role, without importing any.

        Raises:
            ConfigError: The list of who may be seen names what is not installed.
        """
        admitted = [p for p in self._list_installed() if self._admission.admits(p)]
        everyone = sort_plugins([*self._registered, *admitted])
        return [p for p in everyone if role is None or p.role == role]

    def _list_installed(self) -> list[PluginInfo]:
        if self._installed is None:
            self._installed = list_entry_points()
        self._admission.check(self._installed)
        return self._installed

    def find(self, role: Role, name: str) -> PluginInfo:
        """Return the plugin that `name`, plain or as `distribution:name`, means.

        Raises:
            UnknownPluginError: There is none; the message lists the choices and the nearest.
            PluginConflictError: Two distributions offer the name.
        """
        session = [p for p in self._registered if p.role == role and p.is_named(name)]
        if session:
            return session[0]
        admitted = self.list_plugins()
        installed = self._list_installed()
        return find_plugin(role, name, admitted, installed, self._admission.reason())

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
        """Call `dovetail_compile` of one backend.

        Raises:
            BrokenPluginError: The keys of the model's `state_dict` became others.
        """
        from torch import nn

        before = list(model.state_dict())
        arguments = {"model": model, "task": task, "options": options}
        part: nn.Module = self._call("compile", name, arguments, nn.Module)
        check_keys(part, before, self.load("compile", name).info.where)
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
            name = self.default_name("collate", task.modality)
            return name, self.build_options(
                "collate", name, tables.get(task.modality, {}), config_dir
            )
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

    def default_name(self, role: Role, name: str) -> str:
        """Return how a backend is called that nobody chose: ours, whoever else took its name."""
        matches = [p for p in self.list_plugins(role) if p.is_named(name)]
        has_rivals = len(matches) > 1 and not any(p in self._registered for p in matches)
        is_ours = any(p.distribution == PROJECT for p in matches)
        return f"{PROJECT}:{name}" if has_rivals and is_ours else name

    def chain(self, hook: HookName, name: str) -> list[PluginInfo]:
        """Return what a call would run, the outermost wrapper first, the backend last."""
        function = hook_function(hook)
        around = [w.info for w in self._load_wrappers() if function in w.options_models]
        return [*around, self.load(hook, name).info]

    def _call(
        self, hook: HookName, name: str, arguments: dict[str, Any], kind: type, asked: str = ""
    ) -> Any:
        backend = self.load(hook, name)
        part = self._chain(hook, backend, arguments)
        where = f"{backend.info.where} hook {hook_function(hook)}"
        if part is None:
            found = "answered None" + (f" for the modality {asked!r}" if asked else "")
            hint = f"Choose another backend: {hook}.use."
            raise PluginError(build_message(where, found, with_article(kind), hint))
        check_part(part, kind, where)
        return part

    def _chain(self, hook: HookName, backend: Backend, arguments: dict[str, Any]) -> Any:
        answer, record = call_chain(hook, backend, self._load_wrappers(), arguments)
        self.history.append(record)
        return answer

    def _load_wrappers(self) -> list[Backend]:
        """Return the wrappers, the outermost first; one that is named twice wraps once."""
        loaded: dict[int, Backend] = {}
        for name in self._wrappers:
            backend = self.load("wrap", name)
            loaded.setdefault(id(backend.plugin), backend)
        return order_wrappers(list(loaded.values()))

    def lock(self, chosen: Mapping[HookName, Mapping[str, PluginOptions]]) -> list[dict[str, str]]:
        """Return the rows of `plugins.lock.json`: dovetail, each backend, each wrapper."""
        rows = [
            lock_row(self.load(hook, name).info, options)
            for hook in HOOKS
            for name, options in chosen.get(hook, {}).items()
        ]
        wrappers = [lock_row(wrapper.info, None) for wrapper in self._load_wrappers()]
        return [core_row(), *rows, *wrappers]
