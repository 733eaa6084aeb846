"""Windows whose length changes, or that items end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from dovetail.errors import ConfigError, DataError
from dovetail_plugins.accumulate.exact import GradientAccumulator, Options, dovetail_accumulate


def accumulator_of(*args, **kwargs):
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return parameter, GradientAccumulator(optimizer, *args, max_grad_norm=None, **kwargs)


def feed(parameter, accumulator, weights):
    """Feed losses whose gradient is their weight; return where steps were taken."""
    return [accumulator.accumulate(parameter * weight, nn.Identity(), weight) for weight in weights]


def test_accumulate_follows_steps_that_change():
    parameter, accumulator = accumulator_of({0: 1, 2: 3, 3: 2})
    read = []
    for _ in range(9):
        read.append((accumulator.accumulation_steps, *feed(parameter, accumulator, [2.0])))
    assert read == [
        (1, True), (1, True), (3, False), (3, False), (3, True),
        (2, False), (2, True), (2, False), (2, True),
    ]  # fmt: skip
    assert parameter.item() == -2 * 5


@given(
    st.dictionaries(st.integers(1, 9), st.integers(1, 4), max_size=3),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 3),
)
def test_count_steps_is_what_epochs_take(later, first, num_batches, num_epochs):
    parameter, accumulator = accumulator_of({0: first, **later})
    expected = accumulator.count_steps(num_batches, num_epochs)
    for _ in range(num_epochs):
        feed(parameter, accumulator, [1.0] * num_batches)
        accumulator.flush(nn.Identity())
    assert accumulator.effective_step == expected


def test_state_dict_goes_on_in_a_schedule():
    parameter, accumulator = accumulator_of({0: 1, 2: 3})
    feed(parameter, accumulator, [1.0, 2.0, 3.0])
    other, restored = accumulator_of({0: 1, 2: 3})
    restored.load_state_dict(accumulator.state_dict())
    assert restored.accumulation_steps == 3
    assert feed(other, restored, [4.0, 5.0]) == [False, True]
    feed(parameter, accumulator, [4.0, 5.0])
    assert parameter.item() == other.item() - 3  # the two steps before
    feed(parameter, accumulator, [1.0])
    _, shorter = accumulator_of({0: 1, 2: 2})
    with pytest.raises(ConfigError, match="open window of accumulation_steps 3"):
        shorter.load_state_dict(accumulator.state_dict())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 25))
def test_accumulate_ends_window_when_items_reach_tokens_per_step(sizes, tokens_per_step):
    parameter, accumulator = accumulator_of(tokens_per_step=tokens_per_step)
    before, window = 0.0, []
    for size in sizes:
        window.append(size)
        has_stepped = feed(parameter, accumulator, [size])[0]
        assert has_stepped == (sum(window) >= tokens_per_step)
        if has_stepped:
            mean = sum(each * each for each in window) / sum(window)
            assert before - parameter.item() == pytest.approx(mean, rel=1e-12)
            before, window = parameter.item(), []
    if accumulator.flush(nn.Identity()):
        mean = sum(each * each for each in window) / sum(window)
        assert before - parameter.item() == pytest.approx(mean, rel=1e-12)
    assert accumulator.count_steps(10) is None


@pytest.mark.parametrize("options", [{"tokens_per_step": 7}, {"accumulation_steps": {0: 1, 1: 3}}])
def test_plan_tells_the_windows_that_accumulate_takes(options):
    sizes = [3, 1, 4, 1, 5, 9, 2, 6]
    parameter, accumulator = accumulator_of(**options)
    by_itself, other = accumulator_of(**options)
    stepped = [
        accumulator.accumulate(parameter * each.batch, nn.Identity(), each.items, each.is_final)
        for each in accumulator.plan(sizes, float)
    ]
    assert stepped[:-1] == feed(by_itself, other, sizes)[:-1]
    assert stepped[-1]
    other.flush(nn.Identity())
    assert parameter.item() == by_itself.item()


def test_state_dict_holds_items_of_open_window():
    parameter, accumulator = accumulator_of(tokens_per_step=10)
    feed(parameter, accumulator, [4, 4])
    other, restored = accumulator_of(tokens_per_step=10)
    restored.load_state_dict(accumulator.state_dict())
    assert feed(other, restored, [2]) == [True]


def test_accumulate_refuses_tensor_weight_when_tokens_end_a_window():
    parameter, accumulator = accumulator_of(tokens_per_step=10)
    with pytest.raises(DataError, match="a tensor on cpu, where tokens_per_step counts the items"):
        feed(parameter, accumulator, [torch.tensor(3)])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"accumulation_steps": {}}, "begins at no step"),
        ({"accumulation_steps": {3: 2}}, "begins at 3 step"),
        ({"accumulation_steps": {0: 0}}, "accumulation_steps must be >= 1, got 0"),
        ({"accumulation_steps": {0: 1, -1: 2}}, "step must be >= 0, got -1"),
        ({"accumulation_steps": 2, "tokens_per_step": 5}, "both end a window"),
        ({"tokens_per_step": 0}, "tokens_per_step must be >= 1, got 0"),
    ],
)
def test_accumulator_refuses_schedule_that_is_none(arguments, shown):
    with pytest.raises(ConfigError, match=shown):
        accumulator_of(**arguments)


def test_options_take_a_schedule_and_tokens():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    table = Options.model_validate({"steps": {"0": 1, "2": 4}})  # keys of TOML are strings
    accumulator = dovetail_accumulate(nn.Identity(), optimizer, None, table)
    assert [accumulator.count_steps(number) for number in (2, 6, 7)] == [2, 3, 4]
    tokens = dovetail_accumulate(nn.Identity(), optimizer, None, Options(tokens_per_step=9))
    assert tokens.count_steps(5) is None
    for wrong in ({"steps": {}}, {"steps": {"0": 1.5}}, {"tokens_per_step": 0}):
        with pytest.raises(ValidationError):
            Options.model_validate(wrong)


def test_hook_refuses_tokens_when_several_processes_train(monkeypatch):
    monkeypatch.setattr("dovetail_plugins.accumulate.exact.num_ranks", lambda: 2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    with pytest.raises(ConfigError, match="tokens_per_step: got 9 for a run on 2 processes"):
        dovetail_accumulate(nn.Identity(), optimizer, None, Options(tokens_per_step=9))
