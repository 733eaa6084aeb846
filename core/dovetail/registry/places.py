"""File and line of what an author has to mend."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)


def place_of_error(err: BaseException, value: str = "") -> str:
    """Return ` (file:line)` of the innermost frame of an author's code, or an empty string.

    Args:
        err: What was raised.
        value: Import path of the plugin; a frame in its package comes before any other, as it may
            have called into a library that raised.
    """
    foreign = ("importlib", "pluggy", _HERE)
    frames = [
        frame
        for frame in traceback.extract_tb(err.__traceback__)
        if not any(part in frame.filename for part in foreign)
    ]
    if isinstance(err, SyntaxError) and err.filename:
        return f" ({err.filename}:{err.lineno})"
    package = value.partition(":")[0].partition(".")[0].strip()
    own = [f for f in frames if package in (Path(f.filename).stem, *Path(f.filename).parts)]
    innermost = [*frames, *own][-1:]
    return "".join(f" ({frame.filename}:{frame.lineno})" for frame in innermost)


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
