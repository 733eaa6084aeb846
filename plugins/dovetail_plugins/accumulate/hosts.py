"""Trainers of other frameworks that accumulate gradients themselves.

Nothing is imported: a trainer of a framework can only exist if the framework was imported.
"""

from __future__ import annotations

import sys

from dovetail.errors import AccumulationConflictError

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def lightning_accumulation(trainer: object) -> int | None:
    """Return over how many batches a Lightning trainer accumulates.

    Args:
        trainer: Anything; a class that is merely named like a trainer is none.

    Returns:
        The trainer's `accumulate_grad_batches`, or the largest that one of its
        `GradientAccumulationScheduler` callbacks will set; `None` if `trainer` is no instance of
        Lightning's own class, under either of its two import names.
    """
    for package in _LIGHTNING:
        if _is_instance(trainer, package, "Trainer"):
            steps = [int(getattr(trainer, "accumulate_grad_batches", 1))]
            for callback in getattr(trainer, "callbacks", ()):
                if _is_instance(callback, f"{package}.callbacks", "GradientAccumulationScheduler"):
                    steps.extend(callback.scheduling.values())
            return max(steps)
    return None


def is_left_to_trainer(trainer: object, steps: int) -> bool:
    """Return whether `trainer` accumulates, so that an accumulator of `steps` must not.

    Raises:
        AccumulationConflictError: Both would accumulate.
    """
    trainer_steps = lightning_accumulation(trainer) or 1
    if trainer_steps > 1 and steps > 1:
        raise AccumulationConflictError(
            "GradientAccumulator: conflict: two parties would accumulate gradients\n"
            f"  accumulation_steps: {steps}\n"
            f"  accumulate_grad_batches: {trainer_steps} (Lightning trainer)\n"
            "Resolution options:\n"
            "  1. Let the trainer accumulate: set accumulation_steps to 1.\n"
            "  2. Accumulate exactly here: set the trainer's accumulate_grad_batches to 1.\n"
            "  3. Train without the trainer: pass trainer=None and run the loop yourself."
        )
    return trainer_steps > 1


def _is_instance(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)
