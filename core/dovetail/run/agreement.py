"""Whether every process of a run has the same plugins: ranks compare locks, workers files."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed

from dovetail.errors import LockError, build_message
from dovetail.registry import PluginInfo
from dovetail.registry.lock import Row, compare_locks, files_digest

_MEMORY = secrets.token_hex()
"""Differs between processes, but not between a process and those that are forked from it."""


def check_ranks(rows: Sequence[Row]) -> None:
    """Compare the lock of this rank with those of all others, where there are others.

    Every rank raises, so that none is left waiting for the others.

    Args:
        rows: The lock of this rank.

    Raises:
        LockError: Ranks differ; the message names the first that differs from rank 0, and in what.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gathered: list[Sequence[Row]] = [()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, list(rows))
    for rank, theirs in enumerate(gathered):
        differences = compare_locks(gathered[0], theirs)
        if differences:
            found = f"differ from those of rank 0: {'; '.join(differences)}"
            hint = "Install the same releases on every machine."
            raise LockError(build_message(f"plugins of rank {rank}", found, action=hint))


@dataclass(frozen=True)
class WorkerCheck:
    """What a data loader's worker does first: see that its collator is the run's own.

    A forked worker goes on with the code that the run has loaded. One that is started anew imports
    it again, and would collate with whatever was installed since.
    """

    plugin: str
    """The collator's plugin, for messages."""
    value: str
    """Import path of the plugin."""
    files_sha256: str
    """Digest of its files when the run began."""
    memory: str = _MEMORY
    """Whose memory a forked worker shares."""

    @classmethod
    def of(cls, info: PluginInfo, rows: Sequence[Row]) -> WorkerCheck:
        """Return the check for a collator that stands in a lock."""
        digests = {(row["hook"], row["name"]): row["files_sha256"] for row in rows}
        return cls(info.where, info.value, digests[info.role, info.name])

    def __call__(self, worker_id: int) -> None:
        """Compare the files.

        Raises:
            LockError: They were changed.
        """
        if self.memory == _MEMORY:
            return
        if self.files_sha256 and files_digest(self.value) != self.files_sha256:
            found = "its files were changed since the run began"
            where = f"data worker {worker_id}: {self.plugin}"
            raise LockError(build_message(where, found, action="Start the run again."))
