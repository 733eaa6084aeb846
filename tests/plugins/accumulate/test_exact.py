from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from dovetail.errors import CheckpointError, ConfigError, DataError
from dovetail.types import AccumulationStats, Accumulator, WindowResult
from dovetail_plugins.accumulate.exact import GradientAccumulator, Options, dovetail_accumulate

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

window_sizes = st.integers(1, 5)
length_lists = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=3), max_size=7, min_size=1
)


def windows_of(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def linear_parts(dtype=torch.float32, lr=0.1):
    torch.manual_seed(3)
    model = nn.Linear(6, 3).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def regression_data(num_samples, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(num_samples, 6, generator=generator).to(dtype),
        torch.randn(num_samples, 3, generator=generator).to(dtype),
    )


def feed(accumulator, model, losses, **kwargs):
    """Accumulate `losses`, callables or numbers that the gradient is multiplied by."""
    x, y = regression_data(4)
    return [
        accumulator.accumulate(F.mse_loss(model(x), y) * factor, model, **kwargs)
        for factor in losses
    ]


# Exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@given(lengths=length_lists, steps=window_sizes)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_accumulate_equals_large_batch(
    language, step_recorder, relative_error, vector, dtype, as_tensor, lengths, steps
):
    model, large = language.model(dtype), language.model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    large_optimizer = torch.optim.SGD(large.parameters(), lr=0.5)
    found = step_recorder(optimizer).gradients
    expected = step_recorder(large_optimizer).gradients
    accumulator = GradientAccumulator(optimizer, steps, max_grad_norm=None)
    batches = [language.batch(each, seed) for seed, each in enumerate(lengths)]
    for index, batch in enumerate(batches):
        count = language.count(batch)
        weight = torch.tensor(count) if as_tensor else count
        loss = language.loss(model, batch)
        accumulator.accumulate(loss, model, weight, is_final_batch=index + 1 == len(batches))
        if accumulator.is_window_open:
            continue
        window = batches[index - index % steps : index + 1]
        together = language.concatenate(window)
        large_loss = language.loss(large, together)
        large_loss.backward()
        large_optimizer.step()
        large_optimizer.zero_grad()
        result = accumulator.last_window
        assert result.items == language.count(together)
        assert result.loss == pytest.approx(large_loss.item(), rel=10 * TOLERANCE[dtype])
        assert result.num_micro_batches == len(window)
        assert relative_error(found[-1], expected[-1]) <= TOLERANCE[dtype]
    assert len(found) == len(expected) == math.ceil(len(batches) / steps)
    assert relative_error(vector(model), vector(large)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("steps", "num_batches"), [(4, 5), (8, 3), (3, 8)])
def test_accumulate_equals_large_batch_when_tail_is_short(
    step_recorder, relative_error, steps, num_batches
):
    model, optimizer = linear_parts(torch.float64)
    found = step_recorder(optimizer).gradients
    accumulator = GradientAccumulator(optimizer, steps, max_grad_norm=None)
    x, y = regression_data(2 * num_batches, torch.float64)
    for index, (xs, ys) in enumerate(zip(x.split(2), y.split(2), strict=True)):
        before = [p.detach().clone() for p in model.parameters()]
        loss = F.mse_loss(model(xs), ys)
        accumulator.accumulate(loss, model, 2, is_final_batch=index == num_batches - 1)
    tail = num_batches % steps
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    expected = torch.autograd.grad(
        F.mse_loss(model(x[-2 * tail :]), y[-2 * tail :]), list(model.parameters())
    )
    assert relative_error(found[-1], torch.cat([g.flatten() for g in expected])) <= 1e-12


def test_accumulate_eight_by_four_equals_one_batch_of_32(vector, relative_error):
    x, y = regression_data(32, torch.float64)
    model, optimizer = linear_parts(torch.float64)
    accumulator = GradientAccumulator(optimizer, 8, max_grad_norm=1.0, batch_size=4)
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        accumulator.accumulate(F.mse_loss(model(xs), ys), model, 4)
    large, large_optimizer = linear_parts(torch.float64)
    loss = F.mse_loss(large(x), y)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(large.parameters(), 1.0)
    large_optimizer.step()
    assert relative_error(vector(model), vector(large)) <= 1e-12
    assert accumulator.last_window.loss == pytest.approx(loss.item(), rel=1e-12)
    assert accumulator.last_grad_norm == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("weight", [None, 5, torch.tensor(5)], ids=["none", "number", "tensor"])
def test_accumulate_equals_textbook_loop_to_the_bit_when_sizes_are_equal(vector, steps, weight):
    x, y = regression_data(5 * steps * 3)
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, steps, max_grad_norm=None)
    by_hand, hand_optimizer = linear_parts()
    arguments = () if weight is None else (weight,)
    for index, (xs, ys) in enumerate(zip(x.split(5), y.split(5), strict=True)):
        accumulator.accumulate(F.mse_loss(model(xs), ys), model, *arguments)
        (F.mse_loss(by_hand(xs), ys) / steps).backward()
        if (index + 1) % steps == 0:
            hand_optimizer.step()
            hand_optimizer.zero_grad()
    assert torch.equal(vector(model), vector(by_hand))


@pytest.mark.parametrize("max_norm", [0.05, 1e6], ids=["clips", "does not clip"])
def test_accumulate_clips_like_torch(language, step_recorder, relative_error, max_norm):
    batches = [language.batch(lengths, 9) for lengths in ([9, 2], [1], [5, 5, 5])]
    model = language.model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = step_recorder(optimizer).gradients
    accumulator = GradientAccumulator(optimizer, 3, max_norm)
    for batch in batches:
        accumulator.accumulate(language.loss(model, batch), model, language.count(batch))
    large = language.model(torch.float64)
    language.loss(large, language.concatenate(batches)).backward()
    norm = nn.utils.clip_grad_norm_(large.parameters(), max_norm)
    expected = torch.cat([p.grad.flatten() for p in large.parameters()])
    assert relative_error(found[0], expected) <= 1e-12
    assert accumulator.last_window.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    assert (found[0].norm() <= max_norm).item()


def test_accumulate_takes_sparse_gradients(relative_error):
    def train(is_sparse):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=is_sparse)
        accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=1.0), 2, 0.5)
        for ids in ([1, 1, 2], [2, 4]):
            accumulator.accumulate(model(torch.tensor(ids)).pow(3).mean(), model, len(ids))
        return model.weight.detach(), accumulator.last_grad_norm

    (found, norm), (expected, dense_norm) = train(True), train(False)
    assert relative_error(found, expected) <= 1e-6
    assert norm == pytest.approx(dense_norm, rel=1e-6)


@pytest.mark.parametrize("weights", [(1, 3), (torch.tensor(1), torch.tensor(3))])
def test_accumulate_takes_bfloat16_loss(weights):
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    accumulator = GradientAccumulator(torch.optim.SGD([parameter], lr=1.0), 2, None)
    for weight, factor in zip(weights, (4.0, 8.0), strict=True):
        accumulator.accumulate((parameter * factor).sum(), nn.Identity(), weight)
    assert parameter.tolist() == [1 - (4 + 3 * 8) / 4] * 2
    assert accumulator.last_window.loss == (8 + 3 * 16) / 4


def test_accumulate_follows_added_param_group(vector):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer)
    feed(accumulator, model, [1.0])
    extra = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [extra]})
    accumulator.accumulate(extra * 3, model)
    assert accumulator.last_grad_norm == pytest.approx(3.0)
    assert extra.item() == pytest.approx(1 - 0.1, rel=1e-5)


def test_accumulate_is_exact_when_loss_is_a_view_of_a_parameter():
    # Autograd may hand the gradient that backward starts from to such a parameter as its own.
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    accumulator = GradientAccumulator(optimizer, 2, max_grad_norm=None)
    for _ in range(6):
        accumulator.accumulate(parameter.squeeze(), nn.Identity())
    assert parameter.item() == -3


# Weights


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("order", [[0, 4, 6], [4, 0, 6], [4, 6, 0]])
def test_accumulate_ignores_micro_batch_of_weight_zero(
    language, step_recorder, relative_error, as_tensor, order
):
    model = language.model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = step_recorder(optimizer).gradients
    accumulator = GradientAccumulator(optimizer, 3, max_grad_norm=None)
    batches = []
    for count in order:
        tokens, targets = language.batch([max(count, 1)], count)
        # All targets ignored: the mean is 0/0.
        batches.append((tokens, targets if count else torch.full_like(targets, -100)))
    losses = [language.loss(model, batch) for batch in batches]
    assert [loss.isnan().item() for loss in losses] == [count == 0 for count in order]
    for loss, count in zip(losses, order, strict=True):
        accumulator.accumulate(loss, model, torch.tensor(count) if as_tensor else count)
    large = language.model(torch.float64)
    expected_loss = language.loss(large, language.concatenate(batches))
    expected_loss.backward()
    expected = torch.cat([p.grad.flatten() for p in large.parameters()])
    assert relative_error(found[0], expected) <= 1e-12
    assert accumulator.last_window.loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert accumulator.last_window.items == 10
    assert accumulator.last_window.num_micro_batches == 3


def test_accumulate_keeps_magnitude_when_first_tensor_weight_is_zero():
    # A scale that is off by the number of items would overflow an fp16 backward.
    parameter = nn.Parameter(torch.ones(()))
    accumulator = GradientAccumulator(torch.optim.SGD([parameter], lr=0.1), 3)
    for weight in [1000, 1000, 1000, 0, 1000]:
        accumulator.accumulate(parameter * 1, nn.Identity(), torch.tensor(weight))
    assert parameter.grad.item() == pytest.approx(1 / 3)


def test_accumulate_skips_backward_of_weight_zero_when_it_would_be_nan(vector):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    x, _ = regression_data(4)
    nothing = torch.zeros(4, 3)
    accumulator.accumulate((model(x) * nothing).sum() / nothing.sum(), model, 0)
    assert feed(accumulator, model, [1.0]) == [True]
    assert vector(model).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_accumulate_takes_no_step_when_window_has_no_items(vector, steps, zero):
    model, optimizer = linear_parts()
    before = vector(model)
    accumulator = GradientAccumulator(optimizer, steps)
    assert feed(accumulator, model, [math.nan] * steps, weight=zero) == [False] * steps
    assert torch.equal(vector(model), before)
    assert not accumulator.is_window_open
    assert accumulator.effective_step == accumulator.skipped_windows == 0
    assert accumulator.last_window.items == 0
    assert math.isnan(accumulator.last_window.loss)
    assert not accumulator.last_window_skipped
    assert feed(accumulator, model, [1.0] * steps)[-1]


@pytest.mark.parametrize("kind", ["python float", "numpy", "float tensor", "mixed"])
def test_accumulate_takes_fractional_weights(step_recorder, relative_error, kind):
    model, optimizer = linear_parts(torch.float64)
    found = step_recorder(optimizer).gradients
    accumulator = GradientAccumulator(optimizer, 3, max_grad_norm=None)
    x, y = regression_data(6, torch.float64)
    sizes = [0.3, 2.7, 1.5]
    kinds = {
        "python float": [float] * 3,
        "numpy": [np.float64] * 3,
        "float tensor": [lambda size: torch.tensor(size, dtype=torch.float64)] * 3,
        "mixed": [float, lambda size: torch.tensor(size, dtype=torch.float64), float],
    }[kind]
    losses = [F.mse_loss(model(xs), ys) for xs, ys in zip(x.split(2), y.split(2), strict=True)]
    mean = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    gradients = torch.autograd.grad(mean, list(model.parameters()), retain_graph=True)
    for make, size, loss in zip(kinds, sizes, losses, strict=True):
        accumulator.accumulate(loss, model, make(size))
    assert relative_error(found[0], torch.cat([g.flatten() for g in gradients])) <= 1e-12


@pytest.mark.parametrize(
    "weight", [-1, math.nan, math.inf, "many", None, torch.ones(1), torch.ones(2)]
)
def test_accumulate_refuses_weight_when_it_is_no_count(weight):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    with pytest.raises(DataError, match=r"accumulate: weight: .*expected a number >= 0"):
        feed(accumulator, model, [1.0], weight=weight)
    assert not accumulator.is_window_open


def test_accumulate_refuses_negative_tensor_weight_at_end_of_window():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    feed(accumulator, model, [1.0], weight=torch.tensor(-1))
    with pytest.raises(DataError, match=r"weight: -1\.0; expected"):
        feed(accumulator, model, [1.0], weight=torch.tensor(4))


def test_accumulate_takes_third_argument_as_final_batch_when_it_is_a_bool():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    x, y = regression_data(2)
    assert accumulator.accumulate(F.mse_loss(model(x), y), model, True)
    assert not accumulator.accumulate(F.mse_loss(model(x), y), model, False)
    assert accumulator.is_window_open


@pytest.mark.parametrize(
    "loss",
    [
        1.0,
        None,
        torch.ones(2, requires_grad=True),
        torch.ones(1, requires_grad=True),
        torch.ones(()),
    ],
    ids=["float", "none", "two", "one in a row", "no graph"],
)
def test_accumulate_refuses_loss_when_it_is_no_scalar_tensor_with_graph(loss):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer)
    with pytest.raises(DataError, match=r"accumulate: loss: .*expected a tensor of shape \(\)"):
        accumulator.accumulate(loss, model)
    assert accumulator.stats.total_steps == 0


# Windows and counts


@pytest.mark.parametrize(
    ("num_batches", "steps", "expected"),
    [(10, 4, [3, 7, 9]), (16, 8, [7, 15]), (3, 1, [0, 1, 2]), (2, 5, [1])],
)
def test_accumulate_steps_at_ends_of_windows(num_batches, steps, expected):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, steps)
    stepped = [
        feed(accumulator, model, [1.0], is_final_batch=index == num_batches - 1)[0]
        for index in range(num_batches)
    ]
    assert [index for index, has_stepped in enumerate(stepped) if has_stepped] == expected


def test_effective_step_counts_optimizer_steps():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    read = [(feed(accumulator, model, [1.0]), accumulator.effective_step)[1] for _ in range(12)]
    assert read == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_stats_tell_counts_and_norm_before_clipping():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2, max_grad_norm=1e-3, batch_size=4)
    assert accumulator.stats == AccumulationStats(0, 0, 0, 8, False, None)
    assert accumulator.last_window is None
    feed(accumulator, model, [1.0, 1.0, 1.0])
    stats = accumulator.stats
    assert (stats.total_steps, stats.optimizer_steps, stats.current_accumulation) == (3, 1, 1)
    assert stats.is_accumulating
    assert stats.last_grad_norm == accumulator.last_grad_norm > 0.1
    assert "1 optimizer steps from 3 micro-batches (1 in the open window)" in str(stats)
    assert accumulator.effective_batch_size == 8
    assert accumulator.accumulation_steps == 2


def test_accumulator_keeps_the_protocol():
    accumulator = GradientAccumulator(linear_parts()[1])
    assert isinstance(accumulator, Accumulator)


def test_flush_ends_open_window(vector):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    assert not accumulator.flush(model)
    feed(accumulator, model, [1.0, 1.0])
    assert accumulator.flush(model)
    assert not accumulator.flush(model)
    once, once_optimizer = linear_parts()
    feed(GradientAccumulator(once_optimizer, 1), once, [1.0])
    assert torch.allclose(vector(model), vector(once), rtol=1e-6, atol=0)
    assert accumulator.effective_step == 1


def test_reset_epoch_warns_and_drops_gradients_when_window_is_open(vector):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    feed(accumulator, model, [1000.0])
    with pytest.warns(UserWarning, match="dropped 1 micro-batches of an open window"):
        accumulator.reset_epoch()
    assert all(p.grad is None for p in model.parameters())
    feed(accumulator, model, [1.0, 1.0])
    fresh, fresh_optimizer = linear_parts()
    feed(GradientAccumulator(fresh_optimizer, 2), fresh, [1.0, 1.0])
    assert torch.equal(vector(model), vector(fresh))


def test_reset_epoch_is_silent_when_no_window_is_open():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    feed(accumulator, model, [1.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulator.reset_epoch()
    assert accumulator.effective_step == 1


# What is not finite


@pytest.mark.parametrize("max_norm", [1.0, None], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_accumulate_skips_window_when_loss_is_not_finite(vector, max_norm, bad, position):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 3, max_norm)
    feed(accumulator, model, [1.0] * 3)
    before, norm = vector(model), accumulator.last_grad_norm
    factors = [1.0] * 3
    factors[position] = bad
    assert feed(accumulator, model, factors) == [False] * 3
    assert torch.equal(vector(model), before)
    assert accumulator.effective_step == accumulator.stats.optimizer_steps == 1
    assert accumulator.skipped_windows == 1
    assert accumulator.last_window_skipped
    assert not math.isfinite(accumulator.last_window.loss)
    assert accumulator.last_grad_norm == norm
    assert feed(accumulator, model, [1.0] * 3)[-1]
    assert not accumulator.last_window_skipped
    assert vector(model).isfinite().all()


def test_accumulate_skips_window_when_loss_is_not_finite_but_gradient_is(vector):
    model, optimizer = linear_parts()
    before = vector(model)
    accumulator = GradientAccumulator(optimizer)
    x, y = regression_data(4)
    assert not accumulator.accumulate(F.mse_loss(model(x), y) + math.inf, model)
    assert torch.equal(vector(model), before)
    assert accumulator.last_window_skipped


@pytest.mark.parametrize("max_norm", [1.0, None], ids=["clipped", "not clipped"])
def test_accumulate_skips_window_when_gradient_is_not_finite(max_norm):
    # sqrt(0) is finite, its derivative is not.
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    accumulator = GradientAccumulator(optimizer, 1, max_norm)
    assert not accumulator.accumulate(parameter.sqrt().sum(), nn.Identity())
    assert parameter.tolist() == [0.0, 0.0]
    assert accumulator.last_window == WindowResult(0.0, 1.0, math.inf, 1, True)


def test_accumulate_skips_window_when_tensor_weight_is_nan(vector):
    model, optimizer = linear_parts()
    before = vector(model)
    accumulator = GradientAccumulator(optimizer, 2)
    feed(accumulator, model, [1.0, 1.0], weight=torch.tensor(math.nan))
    assert torch.equal(vector(model), before)
    assert accumulator.skipped_windows == 1


# Gradient scaler


def test_accumulate_with_scaler_equals_without(vector):
    def train(scaler):
        model, optimizer = linear_parts()
        accumulator = GradientAccumulator(optimizer, 2, 0.5, scaler)
        feed(accumulator, model, [1.0, 2.0, 3.0, 4.0])
        return vector(model), accumulator

    scaled, accumulator = train(torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain, expected = train(None)
    assert torch.allclose(scaled, plain, rtol=1e-6, atol=1e-7)
    assert accumulator.last_grad_norm == pytest.approx(expected.last_grad_norm, rel=1e-6)
    assert accumulator.last_window.loss == pytest.approx(expected.last_window.loss)
    disabled, _ = train(torch.amp.GradScaler("cpu", enabled=False))
    assert torch.equal(disabled, plain)


def test_accumulate_backs_off_and_counts_no_step_when_scaled_gradient_overflows(vector):
    model, optimizer = linear_parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    accumulator = GradientAccumulator(optimizer, 2, 1.0, scaler)
    before = vector(model)
    assert feed(accumulator, model, [100.0, 100.0]) == [False, False]
    assert torch.equal(vector(model), before)
    assert accumulator.effective_step == 0
    assert accumulator.skipped_windows == 1
    assert math.isfinite(accumulator.last_window.loss)
    assert scaler.get_scale() == 2.0**126
    assert any(feed(accumulator, model, [100.0, 100.0])[-1] for _ in range(40))
    assert not torch.equal(vector(model), before)
    assert accumulator.effective_step == 1
    assert accumulator.skipped_windows + 1 == accumulator.stats.total_steps / 2


@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_accumulate_with_scaler_goes_on_after_window_without_items(zero):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2, 1.0, torch.amp.GradScaler("cpu"))
    assert feed(accumulator, model, [1.0, 1.0], weight=zero) == [False, False]
    assert feed(accumulator, model, [1.0, 1.0]) == [False, True]


# State


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("stop", range(6))
def test_state_dict_resumes_to_the_bit_at_any_micro_batch(language, vector, as_tensor, stop):
    batches = [language.batch(lengths, 1) for lengths in ([3], [8, 2], [1], [6], [2, 9], [4])]

    def parts():
        model = language.model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return model, optimizer, GradientAccumulator(optimizer, 4, 0.5)

    def train(model, accumulator, some, is_last):
        for index, batch in enumerate(some):
            count = language.count(batch)
            accumulator.accumulate(
                language.loss(model, batch),
                model,
                torch.tensor(count) if as_tensor else count,
                is_final_batch=is_last and index == len(some) - 1,
            )

    whole, _, accumulator = parts()
    train(whole, accumulator, batches, True)
    first, first_optimizer, first_accumulator = parts()
    train(first, first_accumulator, batches[:stop], False)
    state = saved(
        [first.state_dict(), first_optimizer.state_dict(), first_accumulator.state_dict()]
    )
    # What goes on elsewhere must not reach into the state.
    train(first, first_accumulator, batches[stop:], True)
    second, second_optimizer, second_accumulator = parts()
    second.load_state_dict(state[0])
    second_optimizer.load_state_dict(state[1])
    second_accumulator.load_state_dict(state[2])
    assert second_accumulator.stats.current_accumulation == stop % 4
    train(second, second_accumulator, batches[stop:], True)
    assert torch.equal(vector(second), vector(whole))
    assert second_accumulator.stats == accumulator.stats
    assert second_accumulator.last_window == accumulator.last_window


def test_state_dict_holds_tensors_and_numbers_only():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 3)
    feed(accumulator, model, [1.0] * 4)
    feed(accumulator, model, [1.0], weight=torch.tensor(2))

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for each in value.values() for leaf in leaves(each)]
        if isinstance(value, list):
            return [leaf for each in value for leaf in leaves(each)]
        return [value]

    found = {type(leaf) for leaf in leaves(accumulator.state_dict())}
    assert found == {int, float, torch.Tensor}


def test_state_dict_keeps_its_gradients_when_accumulation_goes_on():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    feed(accumulator, model, [1.0])
    state = accumulator.state_dict()
    before = state["gradients"][0].clone()
    feed(accumulator, model, [1.0])
    assert torch.equal(state["gradients"][0], before)
    accumulator.load_state_dict(state)
    assert feed(accumulator, model, [1.0] * 3, weight=2) == [False, False, True]
    assert torch.equal(state["gradients"][0], before)
    assert accumulator.last_window.items == 1 + 3 * 2


def test_load_state_dict_drops_what_was_accumulated_before(vector):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 2)
    closed = accumulator.state_dict()
    feed(accumulator, model, [1000.0])
    accumulator.load_state_dict(closed)
    assert not accumulator.is_window_open
    assert all(p.grad is None for p in model.parameters())


def test_load_state_dict_refuses_open_window_when_steps_differ():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    feed(accumulator, model, [1.0])
    other = GradientAccumulator(optimizer, 2)
    with pytest.raises(ConfigError, match="open window of accumulation_steps 4"):
        other.load_state_dict(accumulator.state_dict())


def test_load_state_dict_takes_closed_window_when_steps_differ():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    feed(accumulator, model, [1.0] * 8)
    other = GradientAccumulator(optimizer, 2)
    other.load_state_dict(saved(accumulator.state_dict()))
    assert other.effective_step == 2
    assert other.last_grad_norm == accumulator.last_grad_norm
    assert feed(other, model, [1.0, 1.0]) == [False, True]


def test_load_state_dict_refuses_gradients_when_model_differs():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4)
    feed(accumulator, model, [1.0])
    narrow = nn.Linear(2, 3)
    other = GradientAccumulator(torch.optim.SGD(narrow.parameters()), 4)
    with pytest.raises(
        CheckpointError, match=r"gradient 0: shape \(3, 6\); expected shape \(3, 2\)"
    ):
        other.load_state_dict(accumulator.state_dict())
    fewer = GradientAccumulator(torch.optim.SGD([nn.Parameter(torch.ones(3, 6))]), 4)
    with pytest.raises(CheckpointError, match=r"gradient 1: .*expected one of 1 parameters"):
        fewer.load_state_dict(accumulator.state_dict())
    assert not other.is_window_open


def test_load_state_dict_with_scaler_can_flush_at_once(vector):
    def parts():
        model, optimizer = linear_parts()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return model, scaler, GradientAccumulator(optimizer, 4, None, scaler)

    model, scaler, accumulator = parts()
    feed(accumulator, model, [1.0, 1.0])
    state = saved([accumulator.state_dict(), scaler.state_dict()])
    accumulator.flush(model)
    other, other_scaler, other_accumulator = parts()
    other_accumulator.load_state_dict(state[0])
    other_scaler.load_state_dict(state[1])
    assert other_accumulator.flush(other)
    assert torch.equal(vector(other), vector(model))


# Cost


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("weight", [3, torch.tensor(3)], ids=["number", "tensor"])
@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["fp32", "scaled"])
def test_accumulate_reads_nothing_from_device_within_window(host_reads, steps, weight, scaler):
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, steps, scaler=scaler)
    feed(accumulator, model, [1.0] * steps, weight=weight)
    with host_reads:
        feed(accumulator, model, [1.0] * (steps - 1), weight=weight)
        assert host_reads.count == 0
        feed(accumulator, model, [1.0], weight=weight)
    assert host_reads.count > 0


# Arguments and options


@pytest.mark.parametrize("steps", [0, -3])
def test_accumulator_refuses_steps_when_below_one(steps):
    with pytest.raises(ValueError, match=f"accumulation_steps must be >= 1, got {steps}"):
        GradientAccumulator(linear_parts()[1], accumulation_steps=steps)


@pytest.mark.parametrize("steps", [2.5, 2.0, True, "2", None])
def test_accumulator_refuses_steps_when_no_integer(steps):
    with pytest.raises(ConfigError, match="accumulation_steps must be an integer, got"):
        GradientAccumulator(linear_parts()[1], accumulation_steps=steps)


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_accumulator_refuses_max_grad_norm_when_not_positive(max_norm):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0 or None"):
        GradientAccumulator(linear_parts()[1], max_grad_norm=max_norm)


@pytest.mark.parametrize("batch_size", [0, 1.5])
def test_accumulator_refuses_batch_size_when_no_count(batch_size):
    with pytest.raises(ConfigError, match="batch_size must be"):
        GradientAccumulator(linear_parts()[1], batch_size=batch_size)


@pytest.mark.parametrize("steps", [0, -1, 2.5, 2.0, True, "2"])
def test_options_refuse_steps_when_no_count(steps):
    with pytest.raises(ValidationError, match="steps"):
        Options(steps=steps)


@pytest.mark.parametrize("max_norm", [0, -1, math.nan, "none", None])
def test_options_refuse_max_grad_norm_when_not_positive(max_norm):
    with pytest.raises(ValidationError, match="max_grad_norm"):
        Options(max_grad_norm=max_norm)


def test_hook_makes_accumulator_from_options(step_recorder):
    model, optimizer = linear_parts()
    found = step_recorder(optimizer).gradients
    clipped = dovetail_accumulate(
        model, optimizer, None, Options.model_validate({"steps": 2, "max_grad_norm": 0.01})
    )
    assert clipped.accumulation_steps == 2
    feed(clipped, model, [10.0, 10.0])
    unclipped = dovetail_accumulate(model, optimizer, None, Options(max_grad_norm="off"))
    feed(unclipped, model, [10.0])
    assert found[0].norm().item() == pytest.approx(0.01, rel=1e-3)
    assert found[1].norm().item() > 1
    assert Options() == Options(steps=1, max_grad_norm=1.0)


def test_micro_batch_is_a_shared_context_when_model_is_not_distributed():
    model, optimizer = linear_parts()
    accumulator = GradientAccumulator(optimizer, 4, model=model)
    assert accumulator.micro_batch() is accumulator.micro_batch(is_final_batch=True)
    with accumulator.micro_batch():
        pass
