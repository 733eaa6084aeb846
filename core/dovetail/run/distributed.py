"""The processes of a run: who they are, and what they have to agree about.

A launcher such as torchrun starts the processes and tells each of them in its environment which
one it is. What is said between them here are flags and a few numbers, over the CPU: gradients are
the business of the wrapped model and of the accumulator.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dovetail.errors import DovetailError, RunError, build_message, rebuild_error
from dovetail.run.tracking.log import LOG_NAME, MetricLog

T = TypeVar("T")

_SHARED = "_dovetail_is_shared"


class LostRankError(RunError):
    """Another process of the run is gone."""


class Ranks:
    """The processes that train one model together; alone, every method costs next to nothing.

    Args:
        rank: Number of this process, from 0.
        size: How many there are.
        is_owner: Whether the process group was made for this run, which then takes it down.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, is_owner: bool = False) -> None:
        self.rank = rank
        self.size = size
        self._is_owner = is_owner

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def describe(self, device: torch.device) -> str:
        """Return where the run trains, in words."""
        return str(device) if self.size == 1 else f"{self.size} x {device.type}"

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return flag if self.size == 1 else self.add_up([float(flag)])[0] > 0

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, the same numbers on each."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_talk_device())
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def gather(self, value: T) -> list[T]:
        """Return the picklable values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def first(self, value: T) -> T:
        """Return rank 0's value, on every rank."""
        if self.size == 1:
            return value
        sent = [value if self.is_first else None]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]  # type: ignore[return-value]  # rank 0 has sent its own

    def lead(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone, and return its result on every rank.

        Raises:
            Exception: What it raised, on every rank.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as err:
                error = err
        told = self.first(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise _mark(error)
        if told is not None:
            raise _mark(rebuild_error(*told, "rank 0", RunError))
        return self.first(result)  # type: ignore[return-value]  # it is that of rank 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context after which either every rank goes on or none does.

        Nothing in it may wait for another rank.

        Raises:
            Exception: What this rank raised, or else a `RunError` with what another one did.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as err:
            if self.size == 1:
                raise
            error = err
        if self.size == 1:
            return
        texts = self.gather(None if error is None else _spell(error))
        if error is not None:
            raise _mark(error)
        for rank, text in enumerate(texts):
            if text is not None:
                raise _mark(RunError(f"rank {rank}: {text}"))

    def leave(self) -> None:
        """Wait for the others, and take the process group down if it was made for this run."""
        if self._is_owner and dist.is_initialized():
            # Who leaves first takes the connections with him, whatever the others still wait for.
            self.any(False)
            # That of gloo may hang for ever in torch 2.7.
            if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8):
                dist.destroy_process_group()


ALONE = Ranks()
"""A run of one process."""


class SilentLog(MetricLog):
    """The metric log of a rank that does not write.

    Args:
        directory: The run's folder.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME

    def write(self, record: Mapping[str, Any]) -> None:
        """Do nothing: rank 0 writes."""

    @property
    def num_lost(self) -> int:
        """None are lost."""
        return 0

    def tell(self) -> int:
        """Return 0."""
        return 0

    def rewind(self, size_bytes: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def join_ranks() -> Ranks:
    """Join the other processes that a launcher started, if it did.

    A process group that exists already, as that of another framework, is used and left as it is.

    Raises:
        RunError: The others cannot be reached.
    """
    if not dist.is_available():
        return Ranks()
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if num_launched() == 1:
        return Ranks()
    # Flags and counts go over the CPU, so that no talk waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps its store when it starts the processes again, with the addresses of those
        # that are gone (torch 2.8 to 2.15); each life needs a shelf of its own.
        life = f"dovetail-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{size}"
        shelf = PrefixStore(life, store)
        dist.init_process_group(backend, store=shelf, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as err:
        where = f"rank {os.environ.get('RANK', '?')} of {num_launched()}"
        found = f"cannot join the others: {str(err).splitlines()[0]}"
        hint = "Start it with torchrun, or remove WORLD_SIZE from the environment for one process."
        raise RunError(build_message(where, found, action=hint)) from err
    return Ranks(dist.get_rank(), dist.get_world_size(), is_owner=True)


def num_launched() -> int:
    """Return how many processes a launcher says that it started.

    Source: the environment of `torch.distributed.run`.
    """
    text = os.environ.get("WORLD_SIZE", "").strip()
    return max(1, int(text)) if text.isdigit() else 1


def is_shared(error: BaseException) -> bool:
    """Return whether every rank has failed with this error, so that rank 0 alone need tell it."""
    return hasattr(error, _SHARED)


@contextmanager
def explained_loss(ranks: Ranks) -> Iterator[None]:
    """Context in which the loss of another rank is told as such.

    Raises:
        LostRankError: Another rank is gone.
    """
    try:
        yield
    except RuntimeError as err:
        if ranks.size == 1 or not _is_from_transport(err):
            raise
        # What gloo says begins with a place in its sources and ends with advice.
        reason = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(err).split())).partition(". ")[0]
        found = f"lost another rank ({reason})"
        hint = "The launcher names the rank that failed first; resume from the last checkpoint."
        raise LostRankError(build_message(f"rank {ranks.rank}", found, action=hint)) from err


def record_failure(error: BaseException) -> None:
    """Leave what one rank failed with where torchrun looks for what its summary tells.

    Call it while the error is handled: its traceback goes along.
    """
    if is_shared(error) or not os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _talk_device() -> Any:
    # A group for CPU and GPU together is called "cpu:gloo,cuda:nccl".
    has_cpu = any(name in dist.get_backend() for name in ("gloo", "mpi"))
    return "cpu" if has_cpu else torch.accelerator.current_accelerator()


def _spell(error: Exception) -> str:
    return str(error) if isinstance(error, DovetailError) else f"{type(error).__name__}: {error}"


def _mark(error: Exception) -> Exception:
    setattr(error, _SHARED, True)
    return error


def _is_from_transport(error: RuntimeError) -> bool:
    """Return whether it comes from what connects the ranks; gloo has no class of its own."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "Connection closed by peer", "NCCL")
    )
