"""The built-in compiler keeps the contract of its hook."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dovetail.testing import CompilerSuite

# Dynamo's word on one release of Python, not on what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")


class TestInductorWithoutCodegen(CompilerSuite):
    """Everything but the C++ compiler: dynamo, autograd's graphs and the fallback."""

    backend = "inductor"
    options = {"backend": "aot_eager"}


class Pooled(nn.Module):
    """Little enough for the C++ compiler to be done soon: one kernel forward, one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": (torch.tanh(x * self.scale) * attention_mask.unsqueeze(-1)).sum(1)}


@pytest.mark.slow
class TestInductor(CompilerSuite):
    backend = "inductor"

    def build_model(self) -> nn.Module:
        return Pooled()

    def build_batches(self) -> list[dict[str, Tensor]]:
        lengths = (16, 32)
        masks = [torch.ones(3, length, dtype=torch.int64) for length in lengths]
        return [{"x": torch.randn(*mask.shape, 8), "attention_mask": mask} for mask in masks]
