from __future__ import annotations

from collections import UserDict
from datetime import date

import numpy as np
import pytest
import torch

from dovetail.errors import DataError
from dovetail_plugins.collate.labels import read_columns, stack_labels, stack_values


@pytest.mark.parametrize(
    ("labels", "dtype", "shape"),
    [
        ([3, 1], torch.int64, (2,)),
        ([True, False], torch.int64, (2,)),
        ([np.int32(3), np.uint8(1)], torch.int64, (2,)),
        ([torch.tensor(3), torch.tensor(1)], torch.int64, (2,)),
        ([np.array(3), 1], torch.int64, (2,)),
        ([0.7, 0.1], torch.float32, (2,)),
        ([0, 0.7], torch.float32, (2,)),
        ([np.float64(0.7), np.float32(0.1)], torch.float32, (2,)),
        ([torch.tensor(0.7), torch.tensor(0.1)], torch.float32, (2,)),
        ([torch.tensor(0.5).bfloat16()] * 2, torch.float32, (2,)),
        ([[1, 0, 1], [0, 0, 1]], torch.float32, (2, 3)),
        ([(0.2, 0.8), (0.5, 0.5)], torch.float32, (2, 2)),
        ([np.array([1, 0]), np.array([1, 1])], torch.float32, (2, 2)),
        ([torch.tensor([True, False])] * 2, torch.float32, (2, 2)),
        ([np.zeros((4, 5), np.uint8)] * 2, torch.int64, (2, 4, 5)),
        ([np.zeros((4, 5, 1), np.float64)] * 2, torch.float32, (2, 4, 5, 1)),
    ],
)
def test_stack_labels_gives_dtype_by_what_labels_are(labels, dtype, shape):
    result = stack_labels("here", labels)

    assert result.dtype == dtype
    assert result.shape == shape
    np.testing.assert_allclose(
        result.numpy(), np.asarray([np.asarray(torch.as_tensor(v).float()) for v in labels]), 1e-6
    )


def test_stack_labels_gives_float_when_asked():
    assert stack_labels("here", [1, 2], as_float=True).tolist() == [1.0, 2.0]
    assert stack_labels("here", [1, 2], as_float=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["cat", "dog"], r"here samples\[0\]\['labels'\]: got 'cat' \(type str\)"),
        ([1, None], r"samples\[1\]\['labels'\].*NoneType"),
        ([[1, 0], [1]], r"shapes \(1,\), \(2,\)"),
        ([[1, [0, 2]]], "type list"),
        ([2**63, 1], "do not fit"),
        ([2**80], "do not fit"),
        ([np.uint64(2**63)], "do not fit"),
    ],
)
def test_stack_labels_refuses_what_is_not_numeric(labels, match):
    with pytest.raises(DataError, match=match):
        stack_labels("here", labels)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([torch.zeros(2, 3, dtype=torch.float16)] * 2, torch.float16),
        ([torch.zeros(2, dtype=torch.bfloat16)] * 2, torch.bfloat16),
        ([np.zeros((2, 3))] * 2, torch.float64),
        ([np.zeros(2, ">i2")] * 2, torch.int16),
        ([np.zeros(2, bool)] * 2, torch.bool),
        ([np.zeros(2, complex)] * 2, torch.complex128),
        ([1, 2], torch.int64),
        ([1.5, 2], torch.float32),
        ([True, False], torch.bool),
        ([np.float64(1.5)] * 2, torch.float32),
        ([[1.5, 2.0]] * 2, torch.float32),
        ([[1, 2], (3, 4)], torch.int64),
    ],
)
def test_stack_values_keeps_values(values, dtype):
    result = stack_values("here", "key", values)

    assert result.dtype == dtype
    assert len(result) == 2
    for row, value in zip(result, values, strict=True):
        assert torch.equal(
            row,
            torch.as_tensor(np.asarray(value).astype(result.numpy().dtype))
            if dtype != torch.bfloat16
            else value,
        )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("name", "str"),
        (b"name", "bytes"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
        (date(2020, 1, 1), "date"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.array(["a"]), "ndarray"),
        ([[1], [1, 2]], "list"),
    ],
)
def test_stack_values_refuses_what_no_tensor_holds(value, kind):
    with pytest.raises(DataError, match=rf"here samples\[0\]\['key'\].*type {kind}"):
        stack_values("here", "key", [value, value])


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_stack_values_refuses_values_when_shapes_differ(make):
    with pytest.raises(DataError, match=r"\['key'\].*shapes"):
        stack_values("here", "key", [make(2), make(3)])


def test_stack_values_refuses_tensors_when_dtypes_differ():
    with pytest.raises(DataError, match="dtypes"):
        stack_values("here", "key", [torch.zeros(2), torch.zeros(2).long()])


def test_read_columns_takes_any_mapping():
    assert read_columns("here", [UserDict(a=1), {"a": 2}], ("a", "b")) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "empty batch"),
        ([(1, 2)], r"samples\[0\]: got tuple"),
        ([{"a": 1}, {"a": 1, "b": 2}], r"samples\[1\]: key\(s\) 'b'"),
        ([{"a": 1, "b": 2}, {"a": 1}], r"samples\[1\]: key\(s\) 'b'"),
        ([{"a": 1}, {"b": 1}], r"samples\[1\]: key\(s\) 'a', 'b'"),
        ([{"a": 1}, 3], r"samples\[1\]: got int"),
        ([[1]], r"samples\[0\]: got list"),
        ([{"b": 1}], "the key 'a'"),
    ],
)
def test_read_columns_refuses_what_does_not_fit(samples, match):
    with pytest.raises(DataError, match=match):
        read_columns("here", samples, ("a",))
