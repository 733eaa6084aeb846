from __future__ import annotations

import numpy as np
import pytest

from dovetail.bundle.parity import ParityError, measure_error


def one(values, dtype=np.float32):
    return {"logits": np.array(values, dtype)}


def test_measure_error_is_relative_to_the_largest_output():
    assert measure_error(one([100.0, 1.0]), one([100.0, 2.0])) == pytest.approx(0.01)


def test_measure_error_takes_the_worst_output():
    expected = {"a": np.array([10.0]), "b": np.array([1.0])}
    actual = {"a": np.array([11.0]), "b": np.array([1.5])}
    assert measure_error(expected, actual) == pytest.approx(0.5)


def test_measure_error_is_absolute_where_all_outputs_are_zero():
    assert measure_error(one([0.0]), one([0.25])) == 0.25


def test_measure_error_accepts_infinities_in_their_places():
    assert measure_error(one([-np.inf, 1.0]), one([-np.inf, 1.0])) == 0.0
    assert measure_error(one([-np.inf]), one([-np.inf])) == 0.0


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        (one([1.0]), {"other": np.ones(1, np.float32)}, "named"),
        (one([1.0]), one([1.0], np.float64), "float64 instead of float32"),
        (one([[1.0]]), one([1.0]), "shape"),
        (one([1.0]), one([np.nan]), "1 values are NaN or infinite"),
        (one([1.0]), one([np.inf]), "1 values are NaN or infinite"),
        (one([np.inf]), one([-np.inf]), "infinities differ"),
        (one([np.inf]), one([1.0]), "infinities differ"),
        (one([np.nan]), one([np.nan]), "NaN"),
        (one([1, 2], np.int64), one([1, 3], np.int64), "1 of 2 values differ"),
        (one([True], bool), one([False], bool), "1 of 1 values differ"),
    ],
)
def test_measure_error_refuses_outputs_of_another_kind(expected, actual, message):
    with pytest.raises(ParityError, match=message):
        measure_error(expected, actual)
