"""Token sequences of different lengths as one rectangle."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import ConfigError, DataError, build_message
from dovetail_plugins.collate.buffers import new_tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints: TypeAlias = npt.NDArray[np.int64]

IGNORED = -100
"""Target that no loss counts: `ignore_index` of `torch.nn.functional.cross_entropy`."""


_PLAIN = (1, np.dtype(np.int64).char)


@dataclass(frozen=True)
class PaddingRule:
    """How wide a batch is and where its padding goes.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    side: str = "right"
    """"left" or "right"."""
    multiple: int | None = None
    """The width is a multiple of this many tokens; `None` for the longest sequence's length."""
    max_length: int | None = None
    """Longer sequences keep their first so many tokens."""

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ConfigError(
                build_message(
                    "padding_side",
                    f"got {self.side!r}",
                    '"left" or "right"',
                    "Choose left for generation, right otherwise.",
                )
            )
        for name, value in (
            ("pad_to_multiple_of", self.multiple),
            ("max_length", self.max_length),
        ):
            if value is not None and value < 1:
                raise ConfigError(
                    build_message(
                        name, f"got {value!r}", "an integer >= 1 (tokens)", "Remove it for none."
                    )
                )
        if self.multiple and self.max_length and self.max_length % self.multiple:
            raise ConfigError(
                build_message(
                    "max_length",
                    f"got {self.max_length} tokens with pad_to_multiple_of = {self.multiple}",
                    "a multiple of it, so that no batch is wider than max_length",
                    f"Set max_length = {-(-self.max_length // self.multiple) * self.multiple}.",
                )
            )


class Rows:
    """Token sequences and the rectangle they are padded to.

    Args:
        values: One sequence of whole numbers per sample: list, tuple, array or tensor, `(length,)`
            or `(1, length)`.
        rule: How to pad.
        where: Who asks, for messages.
        key: The samples' key, for messages.

    Raises:
        DataError: Something is not a sequence of whole numbers, or all of them are empty.
    """

    parts: list[Ints]
    """The tokens of each sample after truncation, `(length,)`; may be the samples' own memory."""
    given: list[int]
    """Tokens per sample before truncation."""
    kept: list[int]
    """Tokens per sample after truncation."""
    width: int

    def __init__(self, values: Sequence[Any], rule: PaddingRule, where: str, key: str) -> None:
        self._is_left = rule.side == "left"
        self.parts, self.given = read_rows(values, rule.max_length, where, key)
        self.kept = list(map(len, self.parts))
        longest = max(self.kept)
        if not longest:
            raise DataError(
                build_message(
                    f"{where} samples[...][{key!r}]",
                    f"all {len(values)} sequences of the batch are empty",
                    "at least one token",
                    "Drop empty samples in the data set.",
                )
            )
        multiple = rule.multiple or 1
        self.width = -(-longest // multiple) * multiple

    @cached_property
    def flat(self) -> Ints:
        """The tokens of all samples, `(total,)`."""
        return np.concatenate(self.parts)

    def split(self, flat: Ints) -> list[Ints]:
        """Cut `flat`, one value per token, into one part per sample."""
        ends = accumulate(self.kept)
        return [flat[end - length : end] for end, length in zip(ends, self.kept, strict=True)]

    def mask(self) -> Tensor:
        """Return 1 where a token is and 0 where padding is, int64 `(batch, width)`."""
        out = new_tensor((len(self.kept), self.width), torch.int64)
        columns = np.arange(self.width, dtype=np.int32)
        if self._is_left:
            columns = columns[::-1]
        out.numpy()[...] = columns < np.array(self.kept, np.int32)[:, None]
        return out

    def pad(self, parts: Sequence[npt.NDArray[Any]], value: int) -> Tensor:
        """Lay `parts`, one value per token, into the rectangle; `value` where padding is.

        Returns:
            `(batch, width)`: int64, or float32 for fractions.
        """
        is_float = any(part.dtype.kind == "f" for part in parts)
        dtype = torch.float32 if is_float else torch.int64
        out = new_tensor((len(self.kept), self.width), dtype)
        target = out.numpy()
        filler = np.full(self.width, value, target.dtype)
        gaps = [filler[length:] for length in self.kept]
        pieces = [*gaps, *gaps]  # joining rows and gaps in one call writes every element once
        pieces[self._is_left :: 2], pieces[not self._is_left :: 2] = parts, gaps
        np.concatenate(pieces, out=target.reshape(-1))
        return out


def read_rows(
    values: Sequence[Any], limit: int | None, where: str, key: str, may_be_float: bool = False
) -> tuple[list[npt.NDArray[Any]], list[int]]:
    """Read sequences of numbers.

    Args:
        values: Lists, tuples, arrays or tensors, `(length,)` or `(1, length)`.
        limit: Keep the first so many of each; `None` for all.
        where: Who asks, for messages.
        key: The samples' key, for messages.
        may_be_float: Take fractions too.

    Returns:
        One array `(length,)` per sample, int64 or float32, and the lengths before truncation.

    Raises:
        DataError: Something is not a sequence of numbers.
    """
    types = set(map(type, values))
    parts = _unpack(values) if types == {list} else None
    if parts is None:
        is_plain = types == {np.ndarray} and {(v.ndim, v.dtype.char) for v in values} == {_PLAIN}
        parts = (
            list(values)
            if is_plain
            else [_as_row(v, where, key, i, may_be_float) for i, v in enumerate(values)]
        )
    lengths = list(map(len, parts))
    if limit is not None:
        parts = [part[:limit] for part in parts]
    return parts, lengths


def _unpack(rows: Sequence[list[Any]]) -> list[Ints] | None:
    # `struct` is the fastest way from a list of ints to memory, and refuses what is not whole,
    # where NumPy would round without a word.
    lengths = list(map(len, rows))
    memory = bytearray(8 * sum(lengths))
    flat, parts, start = np.frombuffer(memory, np.int64), [], 0
    try:
        for row, length in zip(rows, lengths, strict=True):
            struct.pack_into(f"{length}q", memory, 8 * start, *row)
            parts.append(flat[start : start + length])
            start += length
    except struct.error:
        return None
    return parts


def _as_row(row: Any, where: str, key: str, index: int, may_be_float: bool) -> npt.NDArray[Any]:
    values = row.detach().cpu().numpy() if isinstance(row, Tensor) else row
    try:
        values = np.asarray(values)
    except ValueError:  # a ragged list
        values = np.empty((0, 0), object)
    if values.ndim == 2 and len(values) == 1:
        values = values[0]  # what `return_tensors="pt"` makes of one text
    is_numeric = values.dtype.kind in ("biuf" if may_be_float else "biu")
    is_empty_list = not values.size and isinstance(row, list | tuple)
    if values.ndim != 1 or not (is_numeric or is_empty_list):
        raise DataError(
            build_message(
                f"{where} samples[{index}][{key!r}]",
                f"got {type(row).__name__} of shape {values.shape} and dtype {values.dtype}",
                "a list, array or tensor (length,) of whole numbers",
                "Give one sequence per sample.",
            )
        )
    is_float = values.dtype.kind == "f" and may_be_float
    return values.astype(np.float32 if is_float else np.int64, copy=False)
