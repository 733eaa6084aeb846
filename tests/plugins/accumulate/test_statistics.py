"""What no weighting makes equal to the large batch is refused, or named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dovetail.errors import ConfigError
from dovetail_plugins.accumulate.exact import GradientAccumulator


def train(model, steps, num_batches=3):
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1), steps)
    for _ in range(num_batches):
        accumulator.accumulate(model(torch.randn(4, 3)).mean(), model, 4)


def test_accumulator_refuses_windows_when_loss_is_not_additive():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    for steps, shown in ((4, "4"), ({0: 1, 9: 2}, "2")):
        with pytest.raises(ConfigError, match=f"{shown} micro-batches per step with a loss that"):
            GradientAccumulator(optimizer, steps, is_additive=False)
    with pytest.raises(ConfigError, match="several micro-batches per step with a loss that"):
        GradientAccumulator(optimizer, tokens_per_step=100, is_additive=False)
    GradientAccumulator(optimizer, 1, is_additive=False)


def test_accumulate_names_batch_norms_once_when_they_train():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(5)), nn.Linear(3, 1))
    with pytest.warns(UserWarning, match="cannot equal the large batch") as caught:
        train(model, steps=2, num_batches=5)
    (warning,) = caught
    assert "in '0', '1', '2' and 2 more;" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), 1),
        (nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 1)), 2),
        (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1)), 2),
    ],
    ids=["one step", "frozen", "layer norm"],
)
def test_accumulate_is_silent_when_statistics_do_no_harm(model, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, steps)
