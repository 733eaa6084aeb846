"""The order of wrappers: as they are named, but where one says that it must come first."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence

from dovetail.errors import PluginConflictError, build_message
from dovetail.registry.loading import Backend


def order_wrappers(wrappers: Sequence[Backend]) -> list[Backend]:
    """Return wrappers from the outermost to the innermost.

    They keep the order in which they are given as far as every `before` and `after` holds. A name
    that is not among them asks for nothing.

    Args:
        wrappers: In the order of `[run] plugins`.

    Raises:
        PluginConflictError: Their wishes go round in a circle.
    """
    by_name = {wrapper.info.name: index for index, wrapper in enumerate(wrappers)}
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for index, wrapper in enumerate(wrappers):
        sorter.add(index, *(by_name[name] for name in wrapper.after if name in by_name))
        for name in wrapper.before:
            if name in by_name:
                sorter.add(by_name[name], index)
    try:
        sorter.prepare()
    except graphlib.CycleError as err:
        circle = [wrappers[index].info.name for index in err.args[1]]
        found = f"each of {' before '.join(circle)} asks to come before the next"
        hint = "Leave one of them out."
        raise PluginConflictError(
            build_message("config run.plugins", found, "an order", hint)
        ) from err
    ordered: list[Backend] = []
    ready: list[int] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        # One at a time: the next may become ready only now, and be named earlier than the rest.
        first = ready.pop(0)
        sorter.done(first)
        ordered.append(wrappers[first])
    return ordered
