"""Checkpoints: written aside and renamed, weights as safetensors, nothing that executes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from dovetail.errors import CheckpointError, build_message
from dovetail.run.distributed import ALONE, Ranks, num_launched
from dovetail.run.wrapping import gather_weights
from dovetail.signature import unwrap

_WEIGHTS = "model.safetensors"
_STATE = "state.pt"
_PROGRESS = "progress.json"
_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """The epoch that is under way, from 0."""
    micro_batch: int = 0
    """Micro-batches of that epoch that are done, those of all ranks."""
    micro_step: int = 0
    """Micro-batches done in all."""
    items: int = 0
    """Items trained on."""
    best_value: float | None = None
    """Best value of the monitored metric."""
    best_step: int | None = None
    num_bad_evaluations: int = 0
    """Evaluations since the best one."""
    log_bytes: int = 0
    """Length of the metric log."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of every metric."""
    best_metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics of the best evaluation."""
    num_ranks: int = 1
    """Processes that trained."""


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    parts: Mapping[str, Any],
    progress: Progress,
    *,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint beside its place and rename it when it is whole.

    Rank 0 writes; all ranks call this together, with states that are alike but for the random
    generators'.

    Args:
        directory: Folder of the run's checkpoints.
        model: Its weights are written under the keys of the user's own module.
        parts: What else has a `state_dict`, by name; `None` values are left out.
        progress: How far the run has come.
        ranks: Who trains the model.

    Returns:
        The checkpoint's folder, `step-000100`.

    Raises:
        CheckpointError: It cannot be written; an earlier one stays whole.
    """
    # Among several ranks, what fails in here may be the loss of one.
    with nullcontext() if ranks.size > 1 else _explained(checkpoint_path(directory, progress.step)):
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    weights = gather_weights(model) if ranks.size > 1 else None
    first, *others = ranks.gather(random_state())
    state |= {"random": first, "random_of_others": others}
    return ranks.lead(lambda: _write(directory, weights or unwrap(model), state, progress))


def _write(
    directory: Path,
    model: nn.Module | Mapping[str, Tensor],
    state: Mapping[str, Any],
    progress: Progress,
) -> Path:
    target = checkpoint_path(directory, progress.step)
    aside = directory / f".{target.name}.partial"
    with _explained(target, aside):
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()
        if isinstance(model, nn.Module):
            save_model(model, str(aside / _WEIGHTS))
        else:
            save_file(dict(model), str(aside / _WEIGHTS))
        torch.save(state, aside / _STATE)
        (aside / _PROGRESS).write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
        for file in aside.iterdir():
            _sync(file)
        _replace(target, aside)
    return target


@contextmanager
def _explained(target: Path, aside: Path | None = None) -> Iterator[None]:
    """Context in which every failure is that of writing the checkpoint `target`."""
    try:
        yield
    except Exception as err:  # the writers of weights and state tell a full disk in their own ways
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        reason = err.strerror if isinstance(err, OSError) else None
        found = f"cannot be written: {reason or f'{type(err).__name__}: {err}'}"
        hint = "If the disk is full, free space; earlier checkpoints are whole."
        where = f"checkpoint {str(target)!r}"
        raise CheckpointError(build_message(where, found, action=hint)) from err


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return directory / f"step-{step:06d}"


def _replace(target: Path, new: Path) -> None:
    """Put a whole folder in the place of another, which is there until the very last moment."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    finally:
        _bring_back(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(directory: Path) -> None:
    """Put checkpoints back that were moved aside for new ones that never came."""
    for old in directory.glob(".step-*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            old.rename(target)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def load_progress(path: Path) -> Progress:
    """Read how far the run of a checkpoint had come.

    Raises:
        CheckpointError: There is no checkpoint, or not of this form.
    """
    try:
        return Progress(**json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as err:
        found = f"cannot be read: {err}"
        raise CheckpointError(build_message(f"checkpoint {str(path)!r}", found)) from err


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights, every key of the model and no other.

    Raises:
        CheckpointError: They are missing, damaged, or of another model.
    """
    try:
        load_model(unwrap(model), str(path / _WEIGHTS), strict=True)
    except Exception as err:
        found = f"does not fit {type(unwrap(model)).__name__}: {err}"
        hint = "Resume with the model it was saved from."
        raise CheckpointError(
            build_message(f"checkpoint {str(path)!r}", found, action=hint)
        ) from err


def load_state(path: Path, parts: Mapping[str, Any], *, ranks: Ranks = ALONE) -> None:
    """Restore everything but the weights, the random generators last.

    Among more ranks than there were, the generators of the additional ones stay as they are.

    Args:
        path: The checkpoint's folder.
        parts: What `save_checkpoint` was given.
        ranks: Who goes on with it; all of them call this together.

    Raises:
        CheckpointError: It is missing, damaged, or lacks a part.
    """
    try:
        state = torch.load(path / _STATE, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        known = [state["random"], *state.get("random_of_others", ())]
        if ranks.rank < len(known):
            set_random_state(known[ranks.rank])
    except Exception as err:
        found = f"cannot be restored: {type(err).__name__}: {err}"
        hint = "Resume with the config it was saved with."
        raise CheckpointError(
            build_message(f"checkpoint {str(path)!r}", found, action=hint)
        ) from err


def random_state() -> dict[str, Any]:
    """Return the states of all random generators, as tensors and numbers."""
    version, keys, gauss = random.getstate()
    _, np_keys, np_pos, np_has_gauss, np_gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "keys": list(keys), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(np_keys).astype(np.int64)),
            "position": int(np_pos),
            "has_gauss": int(np_has_gauss),
            "gauss": float(np_gauss),
        },
    }
    if torch.cuda.is_available():
        # One of several ranks has a single device, and no business on those of the others.
        is_alone = num_launched() == 1
        cuda = torch.cuda
        state["cuda"] = cuda.get_rng_state_all() if is_alone else [cuda.get_rng_state()]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["keys"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if num_launched() == 1:
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        else:
            torch.cuda.set_rng_state(state["cuda"][0])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prune(directory: Path, keep: set[Path]) -> None:
    """Remove checkpoints that are neither the best nor the last."""
    for path in _list(directory):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _list(directory: Path) -> list[Path]:
    """Return the checkpoints by step; a copy under a name of the user's own is none of ours."""
    paths = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def has_checkpoint(run_dir: Path) -> bool:
    """Return whether a run has a whole checkpoint."""
    directory = run_dir / "checkpoints"
    _bring_back(directory)
    return bool(_list(directory))


def last_checkpoint(run_dir: Path) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises:
        CheckpointError: The run has none.
    """
    directory = run_dir / "checkpoints"
    _bring_back(directory)
    found = _list(directory)
    if not found:
        where = f"run {str(run_dir)!r}"
        raise CheckpointError(build_message(where, "has no checkpoint", action="Start it anew."))
    return found[-1]
