"""Every failure a user can cause, and the one builder of their messages.

A message reads `<where>: <what was found>; expected <constraint>. <one action>`, so that it
says where to look, what is wrong and what to do, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class DovetailError(Exception):
    """Base of every error that dovetail raises on purpose."""


class ConfigError(DovetailError, ValueError):
    """The configuration, or an argument, cannot be used.

    Args:
        message: What is wrong, one or several problems.
        problems: The single problems when several were found at once.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems) or (message,)


class PluginError(DovetailError):
    """A plugin is unknown, ambiguous, broken, or failed while it worked."""


class UnknownPluginError(PluginError, ConfigError):
    """No installed plugin has the name that the config asks for."""


class PluginConflictError(PluginError, ConfigError):
    """Two distributions offer the same name for the same hook."""


class BrokenPluginError(PluginError):
    """A plugin does not import, or does not keep the contract of its hook."""


class MissingDependencyError(PluginError):
    """A plugin needs a package that is not installed."""


class LockError(PluginError, ConfigError):
    """The plugins are not the ones that a lock names."""


class DataError(DovetailError, ValueError):
    """Samples, batches or labels do not fit together or do not fit the task."""


class ModelError(DovetailError, ValueError):
    """The model does not take the batch, or its output does not fit the loss."""


class AccumulationConflictError(ConfigError):
    """Two parties accumulate gradients at once."""


class RunError(DovetailError):
    """A run cannot start or cannot go on."""


class NonFiniteLossError(RunError):
    """The loss was not finite for too many windows in a row."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, or of another run."""


class ExportError(DovetailError):
    """A model cannot be exported to a format."""


class BundleError(DovetailError):
    """A bundle is incomplete, was changed, or disagrees with the model it came from."""


class DovetailDeprecationWarning(DeprecationWarning):
    """A plugin uses a part of the contract that a later release takes away."""


def rebuild_error(
    kind: str, message: str, where: str, default: type[DovetailError]
) -> DovetailError:
    """Return the error that another process met.

    Args:
        kind: Name of its class.
        message: Its text.
        where: Which process that is, for an error that does not say so itself.
        default: The class where `kind` is none of dovetail's.
    """
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, DovetailError):
        return found(message)
    return default(build_message(where, f"{kind}: {message}".removesuffix(": ")))


def build_message(where: str, found: str, expected: str = "", action: str = "") -> str:
    """Build the text of an error.

    Args:
        where: A dotted config path (`config train.lr`), a file, or
            `plugin 'name' (distribution 1.2) hook dovetail_x`.
        found: What was found there, with `!r`, type, shape or unit.
        expected: The constraint that was not met, without a full stop.
        action: One sentence that says what to do.

    Returns:
        `<where>: <found>; expected <expected>. <action>`, leaving out what is empty.
    """
    text = f"{where}: {found}"
    if expected:
        text += f"; expected {expected}"
    if not text.endswith((".", "?", "!")):
        text += "."
    return f"{text} {action}" if action else text


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `Did you mean 'x'?` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {nearest[0]!r}?" if nearest else ""


def join_problems(title: str, problems: Sequence[str]) -> str:
    """Join several problems into one message, one bullet each; a single one stands alone."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{title}: {len(problems)} problems", *(f"  - {p}" for p in problems)])
