from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dovetail.run.distributed import ALONE
from dovetail_lightning._window import Window


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).square().mean()


def step_of(model: nn.Module, batches: list[Tensor], *, as_tensors: bool, **arguments: Any) -> Any:
    """Do what Lightning does with the losses of a window; return its result and the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    window, divisor = Window(ALONE), arguments.pop("divisor", 4)
    for rows in batches:
        items = torch.tensor(len(rows)) if as_tensors else len(rows)
        (window.add(loss_of(model, rows), items) / divisor).backward()
    result = window.close(optimizer, divisor, arguments.pop("max_norm", None))
    gradients = [p.grad for p in model.parameters()]
    return result, None if None in gradients else torch.cat([g.flatten() for g in gradients])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    divisor=st.integers(1, 7),
    max_norm=st.sampled_from([None, 0.01, 100.0]),
    as_tensors=st.booleans(),
)
def test_window_gives_gradient_of_large_batch(
    sizes: list[int], divisor: int, max_norm: float | None, as_tensors: bool
) -> None:
    torch.manual_seed(sum(sizes))
    model = nn.Linear(3, 2, dtype=torch.float64)
    batches = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    result, found = step_of(
        model, batches, as_tensors=as_tensors, divisor=divisor, max_norm=max_norm
    )
    model.zero_grad()
    loss = loss_of(model, torch.cat(batches))
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert math.isclose(result.loss, loss.item(), rel_tol=1e-12)
    assert math.isclose(result.grad_norm, norm.item(), rel_tol=1e-12)
    assert (result.items, result.num_micro_batches) == (sum(sizes), len(sizes))
    assert not result.is_skipped


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_window_takes_gradients_away_when_not_finite(value: float) -> None:
    rows = torch.ones(2, 3)
    result, gradient = step_of(nn.Linear(3, 2), [rows, rows * value], as_tensors=False)
    assert result.is_skipped
    assert gradient is None


@pytest.mark.parametrize("as_tensors", [False, True])
def test_window_without_items_steps_nowhere(as_tensors: bool) -> None:
    model, window = nn.Linear(3, 2), Window(ALONE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = model(torch.ones(1, 3)).sum() * 0
    window.add(loss, torch.tensor(0) if as_tensors else 0).backward()
    result = window.close(optimizer, 1, 1.0)
    assert (result.items, result.is_skipped) == (0, False)
    assert all(p.grad is None for p in model.parameters())


def test_micro_batch_without_items_does_no_harm_to_its_window() -> None:
    rows = [torch.ones(2, 3), torch.ones(0, 3), torch.full((3, 3), 2.0)]
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    result, found = step_of(model, rows, as_tensors=False)  # the mean of nothing is NaN
    assert not result.is_skipped
    _, expected = step_of(model, [torch.cat(rows)], as_tensors=False)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_window_scales_sparse_gradients() -> None:
    def gradient(batches: list[list[int]]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Embedding(5, 2, sparse=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        window = Window(ALONE)
        for rows in batches:
            (window.add(model(torch.tensor(rows)).square().mean(), len(rows)) / 2).backward()
        window.close(optimizer, 2, None)
        assert model.weight.grad is not None
        return model.weight.grad.to_dense()

    assert torch.allclose(gradient([[1, 1, 2], [4]]), gradient([[1, 1, 2, 4]]), rtol=1e-6)
