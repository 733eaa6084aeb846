"""Imports what a config names as `package.module:object`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError, build_message, did_you_mean


def import_object(path: str, *, where: str, search_dir: Path | None = None) -> Any:
    """Import an object by its path.

    Args:
        path: `package.module:object`.
        where: What names it, for messages: `config model.factory`.
        search_dir: Folder of the config file. Modules in it are found, as those beside a script
            are, and stay importable in the loader's worker processes. They win over namesakes,
            also over one that another config's folder gave to this process.

    Raises:
        ConfigError: The module or the object is not there, or the module raises.
    """
    module_name, _, attribute = path.partition(":")
    if search_dir is not None:
        _prefer_folder(search_dir, module_name.partition(".")[0])
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is None or not (module_name + ".").startswith(f"{err.name}."):
            text = f"{path!r} needs the package {err.name!r}, which is not installed"
            raise ConfigError(build_message(where, text, action=f"Install {err.name}.")) from err
        looked = f" (also looked in {str(search_dir)!r})" if search_dir else ""
        text = f"there is no module {module_name!r}{looked}"
        hint = "Put the module beside the config file or install its package."
        raise ConfigError(build_message(where, text, "package.module:object", hint)) from err
    except (Exception, SystemExit) as err:  # a script without a main guard may call sys.exit
        text = f"{module_name!r} does not import: {type(err).__name__}: {err}"
        raise ConfigError(build_message(where, text, action="Mend the module.")) from err
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            text = f"{module_name!r} has no {attribute!r}"
            hint = did_you_mean(part, names)
            raise ConfigError(build_message(where, text, "an object of the module", hint))
        found = getattr(found, part)
    return found


def _prefer_folder(folder: Path, module: str) -> None:
    """Let the top-level `module` come from `folder` if it is there."""
    if sys.path[:1] != [str(folder)]:
        sys.path[:] = [str(folder), *(p for p in sys.path if p != str(folder))]
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    files = [folder / f"{module}.py", folder / module / "__init__.py"]
    mine = next((file for file in files if file.is_file()), None)
    imported = getattr(sys.modules.get(module), "__file__", None)
    if mine is None or imported is None or mine.resolve() == Path(imported).resolve():
        return
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        del sys.modules[name]


def call_factory(path: str, kwargs: dict[str, Any], *, where: str, search_dir: Path | None) -> Any:
    """Import a factory and call it.

    Args:
        path: `package.module:function`.
        kwargs: Its arguments.
        where: What names it, for messages: `config model`.
        search_dir: Folder of the config file.

    Raises:
        ConfigError: It does not import, is not callable, or does not take the arguments.
    """
    import inspect

    factory = import_object(path, where=f"{where}.factory", search_dir=search_dir)
    if not callable(factory):
        text = f"{path!r} is a {type(factory).__name__}"
        raise ConfigError(build_message(f"{where}.factory", text, "a function or a class"))
    try:
        inspect.signature(factory).bind(**kwargs)
    except (TypeError, ValueError) as err:
        if isinstance(err, ValueError):
            return factory(**kwargs)  # a built-in without a signature
        text = f"{path!r} does not take these arguments: {err}"
        expected = f"arguments that fit {path}{inspect.signature(factory)}"
        raise ConfigError(build_message(f"{where}.kwargs", text, expected)) from err
    return factory(**kwargs)
