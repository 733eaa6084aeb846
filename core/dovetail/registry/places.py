"""File and line of what an author has to mend."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)


def place_of_error(err: BaseException) -> str:
    """Return ` (file:line)` of the innermost frame of an author's code, or an empty string."""
    foreign = ("importlib", "pluggy", _HERE)
    frames = [
        frame
        for frame in traceback.extract_tb(err.__traceback__)
        if not any(part in frame.filename for part in foreign)
    ]
    if isinstance(err, SyntaxError) and err.filename:
        return f" ({err.filename}:{err.lineno})"
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def place_of(thing: Any) -> str:
    """Return ` (file:line)` of a function, a class, a module or an instance's class."""
    is_definition = inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing)
    try:
        target = inspect.unwrap(thing) if is_definition else type(thing)
        file = inspect.getsourcefile(target)
        if inspect.ismodule(target):
            return f" ({file})" if file else ""
        line = inspect.getsourcelines(target)[1]
    except (TypeError, OSError, ValueError):  # made at runtime, or in C
        return ""
    return f" ({file}:{line})"
