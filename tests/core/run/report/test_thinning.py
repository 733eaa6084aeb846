"""Long curves become short, and their peaks stay."""

from __future__ import annotations

import numpy as np

from dovetail.run.report.thinning import thin


def test_thin_keeps_the_points_of_a_short_curve() -> None:
    x = np.array([3.0, 1.0, 2.0])
    curve = thin(x, np.array([30.0, np.inf, 20.0]), max_bins=2)
    assert curve.x.tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(curve.mean, [np.nan, 20.0, 30.0])
    assert curve.non_finite_x.tolist() == [1.0]
    assert curve.num_per_bin == 1


def test_thin_keeps_a_peak_of_a_single_point_in_a_million() -> None:
    x = np.arange(1_000_000.0)
    y = np.ones_like(x)
    y[333_333], y[777_777] = 50.0, -50.0
    curve = thin(x, y, max_bins=300)
    assert len(curve.x) == 300
    assert curve.high.max() == 50.0
    assert curve.low.min() == -50.0
    assert abs(curve.x[curve.high.argmax()] - 333_333) < 3334
    assert curve.num_per_bin in (3333, 3334)


def test_thin_weighs_the_mean_and_leaves_out_what_is_not_finite() -> None:
    x = np.arange(8.0)
    y = np.array([1.0, 4.0, np.nan, 2.0, np.nan, np.inf, 5.0, 5.0])
    weights = np.array([3.0, 1.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    curve = thin(x, y, weights, max_bins=3)
    # Columns of 3, 2 and 3 points; the middle one has a single finite value.
    np.testing.assert_allclose(curve.mean, [(3 + 4) / 4, 2.0, 5.0])
    np.testing.assert_array_equal(curve.low, [1.0, 2.0, 5.0])
    assert curve.non_finite_x.tolist() == [1.0, 3.5, 6.0]


def test_thin_leaves_a_gap_where_a_whole_column_is_not_finite() -> None:
    y = np.ones(30)
    y[10:20] = np.nan
    curve = thin(np.arange(30.0), y, max_bins=3)
    np.testing.assert_array_equal(np.isnan(curve.mean), [False, True, False])
    np.testing.assert_array_equal(np.isnan(curve.high), [False, True, False])


def test_thin_takes_points_that_all_lie_in_one_place() -> None:
    assert len(thin(np.zeros(50), np.arange(50.0), max_bins=3).x) == 50
