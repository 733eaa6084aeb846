from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.errors import ConfigError
from dovetail_plugins.accumulate.windows import plan_windows


def lengths_of(planned):
    """Return the lengths of the windows, having checked what each micro-batch says of its own."""
    lengths, window = [], []
    for number, each in enumerate(planned):
        window.append(each)
        assert each.is_last == (number + 1 == len(planned))
        assert each.num_ranks == 1
        if each.is_final:
            assert {one.window_length for one in window} == {len(window)}
            assert {one.window_items for one in window} == {sum(one.items for one in window)}
            lengths.append(len(window))
            window = []
    assert not window
    return lengths


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_plan_windows_tells_of_each_micro_batch_what_its_window_is(sizes, steps):
    planned = list(plan_windows(sizes, steps, lambda size: size))
    assert [each.batch for each in planned] == sizes
    assert [each.items for each in planned] == sizes
    full, tail = divmod(len(sizes), steps)
    assert lengths_of(planned) == [steps] * full + [tail] * (tail > 0)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 30))
def test_plan_windows_ends_window_when_items_reach_number(sizes, items_per_step):
    planned = list(plan_windows(sizes, 1, lambda size: size, items_per_step=items_per_step))
    assert [each.batch for each in planned] == sizes
    lengths_of(planned)
    for each, following in itertools.pairwise([*planned, None]):
        if each.is_final and following is not None:
            assert each.window_items >= items_per_step > each.window_items - each.items


def test_plan_windows_follows_steps_that_change():
    planned = list(plan_windows(range(10), lambda window: 1 + window // 2, lambda _: 1))
    assert lengths_of(planned) == [1, 1, 2, 2, 3, 1]


def test_plan_windows_reads_one_batch_beyond_the_window():
    read = []

    def source():
        for number in range(9):
            read.append(number)
            yield number

    windows = plan_windows(source(), 3, lambda _: 1)
    assert read == []
    next(windows)
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 1, "items_per_step": 0}])
def test_plan_windows_refuses_number_below_one(arguments):
    with pytest.raises(ConfigError, match="must be >= 1, got 0"):
        next(plan_windows([1], count_items=lambda _: 1, **arguments))
