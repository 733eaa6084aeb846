"""Windows that were not finite: said once, and the end of the run if they do not cease."""

from __future__ import annotations

import warnings

from dovetail.errors import NonFiniteLossError, build_message
from dovetail.types import WindowResult


class SkipWatch:
    """Counts skipped windows.

    Args:
        limit: How many in a row end the run.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_in_row = 0
        self._has_warned = False

    def reset(self) -> None:
        """Begin to count anew, after a step."""
        self._num_in_row = 0

    def note(self, window: WindowResult, step: int) -> None:
        """Count a skipped window after optimizer step `step`.

        Raises:
            NonFiniteLossError: It was one too many in a row.
        """
        self._num_in_row += 1
        reason = f"loss {window.loss}, gradient norm {window.grad_norm}"
        if not self._has_warned:
            self._has_warned = True
            found = f"the window is skipped, as it is not finite ({reason})"
            hint = "The weights are unharmed; further ones stand in the metric log."
            where = f"training after step {step}"
            warnings.warn(build_message(where, found, action=hint), stacklevel=2)
        if self._num_in_row >= self._limit:
            found = f"{self._num_in_row} windows in a row were not finite ({reason})"
            hint = "Lower train.lr, look at the data, or train in fp32; the weights are unharmed."
            where = f"training at step {step}"
            raise NonFiniteLossError(build_message(where, found, action=hint))
