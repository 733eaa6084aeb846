"""What every format is held to: the trained model's signature and its golden outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dovetail.bundle.golden import GoldenCase
from dovetail.bundle.parity import LIMITS, Precision
from dovetail.bundle.served import ServedModel
from dovetail.bundle.specs import (
    bind_sizes,
    check_coverage,
    read_input_specs,
    read_output_specs,
)
from dovetail.errors import DovetailError, ExportError, ModelError, build_message
from dovetail.signature import LABELS
from dovetail.types import ExportInputs, Recipe

if TYPE_CHECKING:
    from dovetail.task import TaskSpec, TensorSpec

_COARSEST_FIRST: tuple[Precision, ...] = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Reference:
    """The trained model, as far as the formats are concerned."""

    inputs: ExportInputs
    outputs: tuple[TensorSpec, ...]
    cases: tuple[GoldenCase, ...]
    sizes: tuple[Mapping[str, int], ...]
    """Size of each varying dimension, for each case."""
    precision: Precision

    @property
    def limit(self) -> float:
        """Largest error a format may show, relative to the largest output."""
        return LIMITS[self.precision]


def serve(
    model: nn.Module, task: TaskSpec, example: Mapping[str, Tensor], transform: nn.Module | None
) -> ServedModel:
    """Make the model that is exported: the task's inputs, else whatever forward takes."""
    values: Mapping[str, object] = example  # a collator keeps every key: strings, metadata
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    named = [spec.name for spec in task.inputs if spec.name in tensors]
    return ServedModel(model, [n for n in named or tensors if n != LABELS], transform)


def build_reference(
    served: ServedModel,
    task: TaskSpec,
    example: Mapping[str, Tensor],
    golden: Sequence[Mapping[str, Tensor]],
    recipe: Recipe | None,
) -> Reference:
    """Run the trained model on every batch and read its signature from what it does.

    Args:
        served: The model, in eval mode on the CPU.
        task: What it was trained for.
        example: The batch that formats are exported with.
        golden: The batches that they are proven with.
        recipe: How the model is rebuilt.

    Raises:
        ExportError: The batches contradict each other or the task, nothing would prove that a
            dimension varies, or the model answers NaN.
        ModelError: The model fails at one of the batches.
    """
    batches = [_pick(served, batch) for batch in (example, *golden)]
    has_transform = not isinstance(served.transform, nn.Identity)
    specs = read_input_specs(task, served.input_names, batches, has_transform=has_transform)
    sizes = [bind_sizes(specs, {n: t.shape for n, t in batch.items()}) for batch in batches]
    check_coverage(sizes[0], sizes[1:])
    cases = [_run(served, batch, index) for index, batch in enumerate(batches)]
    return Reference(
        inputs=ExportInputs(batches[0], specs, tuple(cases[0].outputs), recipe),
        outputs=read_output_specs(cases, sizes),
        cases=tuple(cases[1:]),
        sizes=tuple(sizes[1:]),
        precision=_precision(served),
    )


def _pick(served: ServedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    missing = [name for name in served.input_names if name not in batch]
    if missing:
        found = f"has {', '.join(batch)}"
        raise ExportError(build_message("golden batch", found, f"also {', '.join(missing)}"))
    return {name: batch[name].detach().cpu().contiguous() for name in served.input_names}


def _run(served: ServedModel, batch: Mapping[str, Tensor], index: int) -> GoldenCase:
    where = f"golden batch {index - 1}" if index else "example batch"
    try:
        outputs = served.named_forward(*batch.values())
    except DovetailError:
        raise
    except Exception as err:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        found = f"the trained model does not take {shapes} ({type(err).__name__}: {err})"
        action = "Mend the model's forward: a server sends every batch size and length."
        raise ModelError(build_message(where, found, "outputs", action)) from err
    for name, value in outputs.items():
        if bool(torch.isnan(value).any()):
            found = f"the trained model answers NaN in {name!r}"
            action = "Look for samples that are all padding, or for a diverged training."
            raise ExportError(build_message(where, found, "numbers", action))
    return GoldenCase(
        {name: np.array(value.numpy()) for name, value in batch.items()},
        {name: np.array(value.numpy()) for name, value in outputs.items()},
    )


def _precision(served: ServedModel) -> Precision:
    found = {str(p.dtype).removeprefix("torch.") for p in served.parameters()}
    return next((p for p in _COARSEST_FIRST if p in found), "float32")
