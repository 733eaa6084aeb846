"""What of the contract with plugins is on its way out: the one place that says so.

A hook or an argument that is to go stands here for two minor releases at least. Whoever still
implements it is warned when it is loaded, with file and line; everything works as before until the
release named in `removed_in`. `API_VERSION` grows when something is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypedDict

from dovetail.errors import DovetailDeprecationWarning

MINOR_RELEASES: Final = 2
"""Minor releases that warn before something is removed."""


@dataclass(frozen=True)
class Deprecation:
    """Since when something is deprecated, and what to use instead."""

    since: str
    """Release that began to warn, `major.minor`."""
    removed_in: str
    """Release that does without it, `major.minor`."""
    instead: str
    """What to do instead, one sentence."""

    def warning(self, what: str) -> DovetailDeprecationWarning:
        """Return the warning that an implementation gets."""
        return DovetailDeprecationWarning(
            f"{what} is deprecated since dovetail {self.since} and goes in {self.removed_in}. "
            f"{self.instead}"
        )


HOOKS: Mapping[str, Deprecation] = {}
"""Deprecated hook functions."""

ARGUMENTS: Mapping[str, Mapping[str, Deprecation]] = {}
"""Deprecated arguments, by hook function."""


class SpecWarnings(TypedDict):
    """What `hookspec` takes beside its other options."""

    warn_on_impl: Warning | None
    warn_on_impl_args: Mapping[str, Warning]


def warnings_of(
    function: str,
    hooks: Mapping[str, Deprecation] | None = None,
    arguments: Mapping[str, Mapping[str, Deprecation]] | None = None,
) -> SpecWarnings:
    """Return the keyword arguments with which a hookspec warns of what is deprecated in it.

    Args:
        function: The hook function.
        hooks: Deprecated hooks; those of this file without it.
        arguments: Deprecated arguments; those of this file without it.
    """
    hook = (HOOKS if hooks is None else hooks).get(function)
    of_function = (ARGUMENTS if arguments is None else arguments).get(function, {})
    return SpecWarnings(
        warn_on_impl=hook.warning(f"the hook {function}") if hook else None,
        warn_on_impl_args={
            name: deprecation.warning(f"the argument {name} of {function}")
            for name, deprecation in of_function.items()
        },
    )
