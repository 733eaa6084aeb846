from __future__ import annotations

import math

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scenario", ["numbers", "tensors", "zeros", "zero tensors", "flush"])
def test_accumulate_equals_large_batch_of_all_ranks(two_ranks, relative_error, scenario):
    first, second = (rank[scenario] for rank in two_ranks)
    assert len(first["gradients"]) == 2
    for found, expected in zip(first["gradients"], first["expected"], strict=True):
        assert relative_error(found, expected) <= 1e-6
    assert torch.equal(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert first["items"] == second["items"]
    # The four micro-batches of a window reduce once; flush averages by itself.
    assert first["reductions"] == (1 if scenario == "flush" else 2)


def test_accumulate_skips_window_on_all_ranks_when_loss_of_one_is_nan(two_ranks, relative_error):
    first, second = (rank["nan"] for rank in two_ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert first["stepped"] == second["stepped"] == [False] * 5 + [True]
    assert math.isnan(first["losses"][0])
    assert torch.equal(first["weights"], second["weights"])
    assert relative_error(first["gradients"][0], first["expected"][0]) <= 1e-6
