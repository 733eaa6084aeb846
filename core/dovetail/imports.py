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
            are, and stay importable in the loader's worker processes.

    Raises:
        ConfigError: The module or the object is not there, or the module raises.
    """
    module_name, _, attribute = path.partition(":")
    if search_dir is not None and str(search_dir) not in sys.path:
        sys.path.insert(0, str(search_dir))
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
    except Exception as err:
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
