"""The built-in accumulator keeps the contract of its hook."""

from __future__ import annotations

import pytest

from dovetail.testing import AccumulatorSuite


class TestExact(AccumulatorSuite):
    backend = "exact"
    max_grad_norm = 1.0  # the default of its options
    num_examples = 25


class TestExactUnclipped(AccumulatorSuite):
    backend = "exact"
    options = {"max_grad_norm": "off"}
    num_examples = 25


@pytest.mark.parametrize("max_norm", [0.25, 4.0])
def test_exact_keeps_the_contract_when_it_clips_elsewhere(max_norm) -> None:
    options = {"max_grad_norm": max_norm}
    AccumulatorSuite.check(backend="exact", options=options, max_grad_norm=max_norm, num_examples=5)
