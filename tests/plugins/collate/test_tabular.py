"""The tabular collator: every key kept, nothing changed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dovetail import TaskSpec
from dovetail.errors import DataError
from dovetail_plugins.collate.tabular import TabularCollator, dovetail_collate


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5))))
def test_tabular_stacks_rows_in_order(rows: np.ndarray) -> None:
    batch = TabularCollator()([{"features": row} for row in rows])
    np.testing.assert_array_equal(batch["features"].numpy(), rows)


def test_tabular_keeps_every_key_and_dtype() -> None:
    sample = {
        "features": torch.zeros(3, dtype=torch.float64),
        "weight": 0.5,
        "group": 7,
        "labels": 1,
    }
    batch = TabularCollator()([sample, sample])
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "features": (torch.float64, (2, 3)),
        "weight": (torch.float32, (2,)),
        "group": (torch.int64, (2,)),
        "labels": (torch.int64, (2,)),
    }


def test_tabular_makes_whole_labels_float_for_a_regression() -> None:
    collator = dovetail_collate(task=TaskSpec(kind="regression"), options=None)
    assert collator is not None
    batch = collator([{"x": [1.0], "labels": 3}, {"x": [2.0], "labels": 4}])
    assert batch["labels"].dtype == torch.float32


def test_tabular_leaves_other_modalities_to_others() -> None:
    assert dovetail_collate(task=TaskSpec(modality="audio"), options=None) is None


def test_tabular_is_the_same_after_pickling() -> None:
    copy = pickle.loads(pickle.dumps(TabularCollator()))
    samples = [{"x": [1.0, 2.0], "labels": 0.25}]
    assert torch.equal(copy(samples)["x"], TabularCollator()(samples)["x"])


def test_tabular_refuses_uneven_rows_and_text() -> None:
    with pytest.raises(DataError, match="shapes"):
        TabularCollator()([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}])
    with pytest.raises(DataError, match="name"):
        TabularCollator()([{"name": "a"}])
    with pytest.raises(DataError, match="empty batch"):
        TabularCollator()([])
