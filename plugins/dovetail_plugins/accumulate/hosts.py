"""Loops of other frameworks that accumulate gradients themselves.

Nothing is imported: an object of a framework can only exist if the framework was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.errors import AccumulationConflictError

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


@dataclass(frozen=True)
class Host:
    """A loop that may accumulate."""

    name: str
    """What it is called in a message."""
    setting: str
    """Its name for the micro-batches per optimizer step."""
    steps: int
    """The micro-batches per optimizer step; 1 if it does not accumulate."""
    count_steps: Callable[[], int] | None
    """Says how many optimizer steps it has taken; `None` if it does not count them."""

    @property
    def is_lightning(self) -> bool:
        """Whether it is a trainer of Lightning."""
        return self.setting == "accumulate_grad_batches"


def find_host(*candidates: object) -> Host | None:
    """Return the first of `candidates` that is a loop of a framework known here.

    Args:
        candidates: Trainers, accelerators, engines, optimizers that one of them has wrapped, or
            anything else; a class that is merely named like one of them is none.
    """
    for candidate in candidates:
        for find in (_lightning, _hf_trainer, _accelerate, _deepspeed):
            host = find(candidate)
            if host is not None:
                return host
    return None


def check_conflict(host: Host | None, steps: int) -> None:
    """Raise `AccumulationConflictError` if a host and an accumulator of `steps` both accumulate."""
    if host is not None and host.steps > 1 and steps > 1:
        raise AccumulationConflictError(
            "GradientAccumulator: conflict: two parties would accumulate gradients\n"
            f"  accumulation_steps: {steps}\n"
            f"  {host.setting}: {host.steps} ({host.name})\n"
            "Resolution options:\n"
            f"  1. Let the {host.name} accumulate: set accumulation_steps to 1.\n"
            f"  2. Accumulate exactly here: set {host.setting} to 1.\n"
            f"  3. Train without the {host.name}: pass trainer=None and run the loop yourself."
        )


def lightning_accumulation(trainer: object) -> int | None:
    """Return over how many batches a Lightning trainer accumulates.

    Args:
        trainer: Anything; a class that is merely named like a trainer is none.

    Returns:
        The trainer's `accumulate_grad_batches`, or the largest that one of its
        `GradientAccumulationScheduler` callbacks or its DeepSpeed strategy will set; 1 if its
        module optimises by hand; `None` if `trainer` is no instance of Lightning's own class,
        under either of its two import names.
    """
    for package in _LIGHTNING:
        if _is_instance(trainer, package, "Trainer"):
            module = getattr(trainer, "lightning_module", None)
            if not getattr(module, "automatic_optimization", True):
                return 1
            return max(_lightning_settings(trainer, package))
    return None


def _lightning_settings(trainer: Any, package: str) -> Iterator[int]:
    yield int(getattr(trainer, "accumulate_grad_batches", 1))
    for callback in getattr(trainer, "callbacks", ()):
        if _is_instance(callback, f"{package}.callbacks", "GradientAccumulationScheduler"):
            yield from map(int, callback.scheduling.values())
    strategy = getattr(trainer, "strategy", None)
    if _is_instance(strategy, f"{package}.strategies", "DeepSpeedStrategy"):
        config = getattr(strategy, "config", None)
        steps = config.get("gradient_accumulation_steps") if isinstance(config, Mapping) else None
        yield steps if isinstance(steps, int) else 1  # "auto" is what the trainer has


def _lightning(candidate: Any) -> Host | None:
    steps = lightning_accumulation(candidate)
    if steps is None:
        return None
    return Host(
        "Lightning trainer",
        "accumulate_grad_batches",
        steps,
        lambda: int(candidate.global_step),
    )


def _hf_trainer(candidate: Any) -> Host | None:
    if not _is_instance(candidate, "transformers.trainer", "Trainer"):
        return None
    steps = int(candidate.args.gradient_accumulation_steps)
    return Host(
        "HF Trainer",
        "gradient_accumulation_steps",
        steps,
        lambda: int(candidate.state.global_step),
    )


def _accelerate(candidate: Any) -> Host | None:
    if _is_instance(candidate, "accelerate.accelerator", "Accelerator"):
        steps = int(candidate.gradient_accumulation_steps)
    elif _is_instance(candidate, "accelerate.optimizer", "AcceleratedOptimizer"):
        steps = int(candidate.gradient_state.num_steps)
    elif _is_instance(candidate, "accelerate.state", "GradientState"):
        steps = int(candidate.num_steps)
    else:
        return None
    return Host("Accelerator", "gradient_accumulation_steps", steps, None)


def _deepspeed(candidate: Any) -> Host | None:
    if not _is_instance(candidate, "deepspeed", "DeepSpeedEngine"):
        return None
    return Host(
        "DeepSpeed engine",
        "gradient_accumulation_steps",
        int(candidate.gradient_accumulation_steps()),
        lambda: int(candidate.global_steps),
    )


def _is_instance(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)
