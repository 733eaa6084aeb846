"""What every collator shares: checking samples, stacking labels and all other keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError, build_message
from dovetail_plugins.collate.buffers import new_tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    from dovetail.types import Sample


def read_columns(
    where: str, samples: Sequence[Sample], needed: tuple[str, ...] = ()
) -> dict[str, list[Any]]:
    """Turn samples into lists of values by key.

    Args:
        where: Who asks, for the message.
        samples: The samples of one batch.
        needed: Keys of which at least one must be there; empty for none.

    Returns:
        The values of each key, in the order of the samples.

    Raises:
        DataError: There are no samples, one is not a mapping, or their keys disagree.
    """
    if not len(samples):
        raise DataError(
            build_message(
                where,
                "got an empty batch (0 samples)",
                "at least one sample",
                "Check the batch sampler and the length of the data set.",
            )
        )
    try:
        # As many keys as the first sample has, and all of its keys: the same keys. Comparing the
        # keys of every sample costs more than stacking a small batch.
        if len(set(map(len, samples))) > 1:
            raise KeyError
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    except (KeyError, IndexError, TypeError) as err:
        raise DataError(_explain(where, samples)) from err
    if needed and not any(key in columns for key in needed):
        raise DataError(
            build_message(
                where,
                f"samples have the keys {sorted(map(str, columns))}",
                f"the key {' or '.join(map(repr, needed))}",
                "Rename the key in the data set.",
            )
        )
    return columns


def check_samples(where: str, samples: Sequence[Sample], needed: tuple[str, ...] = ()) -> None:
    """Check that there are samples and that all have the same keys; see `read_columns`.

    Raises:
        DataError: There are none, one is not a mapping, or their keys disagree.
    """
    read_columns(where, samples, needed)


def _explain(where: str, samples: Sequence[Sample]) -> str:
    first = samples[0]
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            return build_message(
                f"{where} samples[{index}]",
                f"got {type(sample).__name__}",
                "a mapping of names to arrays, tensors or numbers",
                "Return a dict from the data set.",
            )
        odd = sorted(map(str, set(sample) ^ set(first)))
        if odd:
            return build_message(
                f"{where} samples[{index}]",
                f"key(s) {', '.join(map(repr, odd))} are not in every sample",
                f"the keys of samples[0]: {sorted(map(str, first))}",
                "Give every sample of the data set the same keys.",
            )
    return build_message(where, "a sample does not give the values of its own keys")


def stack_labels(where: str, values: Sequence[Any], as_float: bool = False) -> Tensor:
    """Stack labels; what they are decides the dtype.

    Args:
        where: Who asks, for the message.
        values: One label per sample: a number, a vector, or an array of higher rank.
        as_float: Give whole numbers as float32 too, as regression needs it.

    Returns:
        Whole numbers: int64 `(batch,)`. Fractions: float32 `(batch,)`. Vectors (several labels,
        or soft ones): float32 `(batch, labels)`. Integer maps of rank two and more (a class per
        pixel): int64 `(batch, ...)`.

    Raises:
        DataError: A label is not numeric, or shapes disagree.
    """
    if not as_float and set(map(type, values)) == {int}:
        return torch.from_numpy(_to_array(where, "labels", values))
    array = _to_array(where, "labels", values)
    is_whole = array.dtype.kind in "biu" and array.ndim != 2 and not as_float
    return torch.from_numpy(array.astype(np.int64 if is_whole else np.float32))


def stack_values(where: str, key: str, values: Sequence[Any]) -> Tensor:
    """Stack the values of any other key.

    Args:
        where: Who asks, for the message.
        key: The key, for the message.
        values: One per sample: tensors, arrays, numbers or (nested) lists of numbers.

    Returns:
        `(batch, ...)`. Tensors and arrays keep their dtype; Python and NumPy numbers and lists
        become int64, float32 or bool.

    Raises:
        DataError: A value cannot be a tensor (a string, say), or shapes disagree.
    """
    if all(isinstance(value, Tensor) for value in values):
        return _stack_tensors(where, key, values)
    array = _to_array(where, key, values)
    if not isinstance(values[0], (np.ndarray, Tensor)):
        array = array.astype(
            {"i": np.int64, "u": np.int64, "f": np.float32}.get(array.dtype.kind, array.dtype)
        )
    out = new_tensor(array.shape, torch.from_numpy(array[:0].copy()).dtype)
    out.numpy()[...] = array
    return out


def _stack_tensors(where: str, key: str, values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    _check_same(where, key, [tuple(v.shape) for v in values], "shapes")
    _check_same(where, key, [v.dtype for v in values], "dtypes")
    if first.device.type != "cpu" or first.layout != torch.strided:
        return torch.stack(list(values))
    out = new_tensor((len(values), *first.shape), first.dtype)
    return torch.stack([v.detach() for v in values], out=out)


def _check_same(where: str, key: str, found: Sequence[Any], what: str) -> None:
    if any(value != found[0] for value in found):
        distinct = ", ".join(sorted({str(value) for value in found}))
        raise DataError(
            build_message(
                f"{where} samples[...][{key!r}]",
                f"{what} {distinct} in one batch",
                f"the same {what} in every sample",
                "Bring them to one size in the data set.",
            )
        )


def _to_array(where: str, key: str, values: Sequence[Any]) -> npt.NDArray[Any]:
    types = set(map(type, values))
    plain = values
    if not types <= {int, float}:
        plain = [_to_numpy(v) if isinstance(v, Tensor) else v for v in values]
        for index, value in enumerate(plain):
            _check_numeric(where, key, index, value)
        _check_same(where, key, [np.shape(v) for v in plain], "shapes")
    try:
        # Left to itself NumPy makes floats of whole numbers beyond int64.
        array = np.asarray(plain, np.int64 if types == {int} else None)
        fits = array.dtype.kind in "biufc" and array.dtype != np.uint64
    except OverflowError:
        fits = False
    if not fits:
        raise DataError(
            build_message(
                f"{where} samples[...][{key!r}]",
                "values do not fit a tensor",
                "numbers within int64 or float64",
                "Change the values in the data set.",
            )
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _to_numpy(value: Tensor) -> npt.NDArray[Any]:
    value = value.detach().cpu()
    # NumPy has no bfloat16; float32 holds all of its values.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _check_numeric(where: str, key: str, index: int, value: Any) -> None:
    try:
        kind = np.asarray(value).dtype.kind if not isinstance(value, Number) else "i"
    except ValueError:  # a ragged list
        kind = "O"
    if kind not in "biufc":
        raise DataError(
            build_message(
                f"{where} samples[{index}][{key!r}]",
                f"got {value if isinstance(value, str) else type(value)!r:.60} "
                f"(type {type(value).__name__})",
                "a tensor, an array, a number, or a list of equal lists of numbers",
                "Encode it as numbers in the data set, or leave the key out there.",
            )
        )
