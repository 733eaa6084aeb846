from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.task import TensorSpec
from dovetail.types import ExportInputs


class Served(nn.Module):
    """A model as an exporter gets it: tensors in order in, a tuple of tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.transform = nn.Identity()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.model(self.transform(tensors[0]), *tensors[1:])
        return out if isinstance(out, tuple) else (out,)


@pytest.fixture
def serve() -> Callable[..., tuple[nn.Module, ExportInputs]]:
    """Return a model and its export inputs.

    `serve(model, {"x": tensor}, {"x": ("batch", 3)}, outputs=("logits",))`.
    """

    def make(
        model: nn.Module,
        tensors: dict[str, Tensor],
        shapes: dict[str, tuple[Any, ...]],
        outputs: tuple[str, ...] = ("logits",),
    ) -> tuple[nn.Module, ExportInputs]:
        specs = tuple(
            TensorSpec(
                name=name,
                # A text that pydantic holds against the dtypes there are.
                dtype=str(tensors[name].dtype).removeprefix("torch."),  # type: ignore[arg-type]
                shape=shape,
            )
            for name, shape in shapes.items()
        )
        served = Served(model).eval().requires_grad_(False)
        return served, ExportInputs(tensors, specs, outputs)

    torch.manual_seed(0)
    return make
