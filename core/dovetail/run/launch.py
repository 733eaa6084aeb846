"""What starts the processes of a run: what it must offer, and whether it has started them again."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import warnings
from contextlib import suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import psutil
import torch

from dovetail.config import RunConfig, TrainingConfig
from dovetail.errors import CheckpointError, ConfigError, build_message
from dovetail.run.checkpoint import Progress
from dovetail.run.device import choose_device
from dovetail.run.distributed import Ranks, num_launched

_FILE = ".launch.json"
_COMMAND = "torchrun --nproc-per-node 2 -m dovetail train config.toml"

_calls = itertools.count()


def check_notebook(config: TrainingConfig) -> None:
    """Refuse a strategy for several processes in a notebook, which is one.

    Raises:
        ConfigError: The config asks for one.
    """
    strategy = config.distributed.strategy
    if strategy == "auto" or not is_notebook():
        return
    where = "config distributed.strategy"
    found = f"got {strategy!r} in a notebook, which is one process"
    hint = f'Run `{_COMMAND}` in a terminal, or write strategy = "auto".'
    raise ConfigError(build_message(where, found, action=hint))


def is_notebook() -> bool:
    """Return whether this is IPython itself, and not a process that it started."""
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None and parent_process() is None


def check_strategy(config: TrainingConfig, ranks: Ranks) -> None:
    """Hold the `distributed` section against the processes there are.

    Raises:
        ConfigError: A setting does not go with the strategy.
    """
    section = config.distributed
    fsdp_only = {"offload": section.offload, "param_dtype": section.param_dtype != "fp32"}
    misplaced = [name for name, is_given in fsdp_only.items() if is_given]
    if section.strategy != "fsdp" and misplaced:
        found = f"goes with strategy 'fsdp', and that is {section.strategy!r}"
        hint = 'Write distributed.strategy = "fsdp", or remove the key.'
        raise ConfigError(build_message(f"config distributed.{misplaced[0]}", found, action=hint))
    if section.strategy == "fsdp" and section.find_unused_parameters:
        found = "goes with strategy 'ddp'; 'fsdp' takes such parameters as they are"
        where = "config distributed.find_unused_parameters"
        raise ConfigError(build_message(where, found, action="Remove the key."))
    if ranks.size == 1 and section.strategy != "auto":
        found = f"got {section.strategy!r}, and there is one process: the run goes on without"
        hint = f"Start several with `{_COMMAND}`."
        text = build_message("config distributed.strategy", found, action=hint)
        warnings.warn(text, stacklevel=2)


def check_same_ranks(progress: Progress, config: TrainingConfig, ranks: Ranks) -> None:
    """Say what it means to go on with another number of processes.

    Raises:
        CheckpointError: The data of a half-done epoch were divided by the user's own code.
    """
    if progress.num_ranks == ranks.size:
        return
    where = "resume"
    found = f"{progress.num_ranks} processes trained, {ranks.size} go on"
    if progress.micro_batch and config.distributed.data == "own":
        hint = f"Start {progress.num_ranks} processes, as they divided this epoch themselves."
        raise CheckpointError(build_message(where, found, action=hint))
    hint = (
        "The rest of the epoch is divided anew; train.batch_size is of each process, so a step's "
        "batch and the number of steps have changed."
    )
    warnings.warn(build_message(where, found, action=hint), stacklevel=2)


def choose_rank_device(name: str, ranks: Ranks) -> torch.device:
    """Return the device of this rank: the GPU of its local number, or what the config names.

    Raises:
        ConfigError: It is not there, or several ranks would share a GPU.
    """
    is_numbered = name.startswith("cuda:")
    if ranks.size == 1 or not (
        is_numbered or name == "cuda" or (name == "auto" and torch.cuda.is_available())
    ):
        return choose_device(name)
    if is_numbered:
        found = f"got {name!r}, and {ranks.size} processes need a GPU each"
        hint = 'Write "cuda"; CUDA_VISIBLE_DEVICES chooses among the GPUs.'
        raise ConfigError(build_message("config train.device", found, action=hint))
    number = int(os.environ.get("LOCAL_RANK", ranks.rank % max(1, torch.cuda.device_count())))
    if number >= torch.cuda.device_count():
        found = (
            f"process {number} on this machine has no GPU: there are {torch.cuda.device_count()}"
        )
        hint = 'Start as many processes as GPUs, or write train.device = "cpu".'
        raise ConfigError(build_message("config train.device", found, action=hint))
    torch.cuda.set_device(number)
    return choose_device(f"cuda:{number}")


class Launch:
    """One start of a launcher, which may start the processes several times (`--max-restarts`).

    Args:
        ranks: All of them make one together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._number = next(_calls)
        self._is_elastic = ranks.size > 1 and "TORCHELASTIC_RUN_ID" in os.environ
        # A machine may leave and another take its number: one that stayed knows the launch.
        self._agents = set(ranks.gather(_describe_parent())) if self._is_elastic else set()

    def find_earlier(self, run: RunConfig) -> Path | None:
        """Return the folder of the run that this launch began before it started over."""
        if not self._is_elastic:
            return None
        for path in (run.dir / run.name).glob(f"*/{_FILE}"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                noted: Any = json.loads(path.read_text(encoding="utf-8"))
                if noted["number"] == self._number and self._agents & set(noted["agents"]):
                    return path.parent
        return None

    def note(self, run_dir: Path) -> None:
        """Leave in a run's folder which launch has begun it."""
        if self._is_elastic:
            noted = {"agents": sorted(self._agents), "number": self._number}
            (run_dir / _FILE).write_text(json.dumps(noted), encoding="utf-8")


def _describe_parent() -> str:
    parent = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {parent.pid} {parent.create_time()}"


def spell_command() -> list[str]:
    """Return the words that start `dovetail` on as many processes as there are now."""
    if num_launched() == 1:
        return ["dovetail"]
    local = os.environ.get("LOCAL_WORLD_SIZE", str(num_launched()))
    return ["torchrun", "--nproc-per-node", local, "-m", "dovetail"]
