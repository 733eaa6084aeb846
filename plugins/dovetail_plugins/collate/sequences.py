"""Batches of token sequences: padding, attention mask, per-token keys, targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dovetail.errors import DataError, build_message
from dovetail_plugins.collate.labels import read_columns, stack_labels, stack_values
from dovetail_plugins.collate.padding import IGNORED, PaddingRule, Rows, read_rows
from dovetail_plugins.collate.tokens import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dovetail.types import Sample

_IDS, _MASK, _TEXT, _LABELS = "input_ids", "attention_mask", "text", "labels"


class TokenCollator:
    """Collates token samples whose labels, if any, are one per sample.

    A sample is a mapping with `input_ids`, a list, array or tensor `(length,)`, or with a raw
    `text`. A key with one value per token (`token_type_ids`, say) is padded like the tokens, any
    other key is stacked; `text` beside `input_ids` is their source and not carried on.

    Args:
        tokenizer: Encodes raw text and knows the padding id; `None` where the samples hold ids.
        padding_side: "left" or "right".
        pad_token_id: Id that fills the rectangle; `None` for the tokenizer's, or 0.
        pad_to_multiple_of: The width is a multiple of this many tokens.
        max_length: Longer sequences keep their first so many tokens.
        vocab_size: Token ids must be below it; `None` for any.
        has_float_labels: Give whole-number labels as float32 too, for regression.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        padding_side: str = "right",
        pad_token_id: int | None = None,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        vocab_size: int | None = None,
        has_float_labels: bool = False,
    ) -> None:
        self.rule = PaddingRule(padding_side, pad_to_multiple_of, max_length)
        self.vocabulary = None if tokenizer is None else Vocabulary(tokenizer, max_length)
        own = 0 if self.vocabulary is None else self.vocabulary.pad_id
        self.pad_token_id = own if pad_token_id is None else pad_token_id
        self.vocab_size = vocab_size
        self.has_float_labels = has_float_labels

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order.

        Returns:
            `input_ids` and `attention_mask`, int64 `(batch, width)`; `labels` as
            `stack_labels` gives them; every other key.

        Raises:
            DataError: There are no samples, they disagree in keys, or a value does not fit.
        """
        columns, rows = self.read(samples)
        batch = {_IDS: rows.pad(rows.parts, self.pad_token_id), **self.rest(columns, rows)}
        if _LABELS in columns:
            batch[_LABELS] = stack_labels(self.name, columns[_LABELS], self.has_float_labels)
        return batch

    @property
    def name(self) -> str:
        """What error messages call this collator."""
        return type(self).__name__

    def read(self, samples: Sequence[Sample]) -> tuple[dict[str, list[Any]], Rows]:
        """Return the samples' values by key, and their tokens.

        Raises:
            DataError: There are no samples, they disagree in keys, or hold no tokens.
        """
        columns = read_columns(self.name, samples, (_IDS, _TEXT))
        texts = columns.pop(_TEXT, [])
        values = columns.pop(_IDS, None) or self._encode(texts)
        rows = Rows(values, self.rule, self.name, _IDS)
        self.check_ids(rows, _IDS)
        return columns, rows

    def rest(self, columns: dict[str, list[Any]], rows: Rows) -> dict[str, Tensor]:
        """Return the attention mask and every other key but the labels."""
        batch = {}
        if _MASK in columns:
            batch[_MASK] = rows.pad(self.per_token(columns, _MASK, rows), 0)
        else:
            batch[_MASK] = rows.mask()
        for key, values in columns.items():
            if key not in (_MASK, _LABELS):
                batch[key] = self._stack(key, values, rows)
        return batch

    def encode(self, texts: Sequence[str], key: str) -> list[Any]:
        """Tokenize raw text.

        Raises:
            DataError: There is no tokenizer.
        """
        if self.vocabulary is None:
            raise DataError(
                build_message(
                    f"{self.name} samples[...][{key!r}]",
                    "tokenizer is required for samples of raw text",
                    "input_ids in the samples, or a tokenizer",
                    "Set collate.text.tokenizer, or tokenize in the data set.",
                )
            )
        return self.vocabulary.encode(texts)

    def per_token(
        self, columns: dict[str, list[Any]], key: str, rows: Rows
    ) -> list[npt.NDArray[np.int64]]:
        """Return the values at `key`, one per token of `rows`.

        Raises:
            DataError: There are not as many as tokens.
        """
        values = columns[key]
        lengths = [_length(value) for value in values]
        if lengths != rows.given:
            raise DataError(
                build_message(
                    f"{self.name} samples[...][{key!r}]",
                    f"{type(values[0]).__name__} of lengths {lengths[:8]} for {rows.given[:8]} "
                    "tokens (-1: not a sequence)",
                    "one value per token of input_ids",
                    "Make them in the data set together with input_ids.",
                )
            )
        return read_rows(values, self.rule.max_length, self.name, key)[0]

    def check_ids(self, rows: Rows, key: str) -> None:
        """Check token ids against the vocabulary's size.

        Raises:
            DataError: An id is outside of it.
        """
        if self.vocab_size is None:
            return
        ids = rows.flat if key == _IDS else rows.flat[rows.flat != IGNORED]
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise DataError(
                build_message(
                    f"{self.name} samples[...][{key!r}]",
                    f"token ids from {ids.min()} to {ids.max()}",
                    f"0 to {self.vocab_size - 1} (task vocab_size {self.vocab_size})",
                    "Use the tokenizer that the task was made for, or set task.vocab_size.",
                )
            )

    def _encode(self, texts: Sequence[Any]) -> list[Any]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(
                    build_message(
                        f"{self.name} samples[{index}][{_TEXT!r}]",
                        f"got {type(text).__name__}",
                        "str",
                        "Give one string per sample.",
                    )
                )
        return self.encode(texts, _TEXT)

    def _stack(self, key: str, values: Sequence[Any], rows: Rows) -> Tensor:
        if [_length(value) for value in values] != rows.given:
            return stack_values(self.name, key, values)
        limit = self.rule.max_length
        parts, _ = read_rows(values, limit, self.name, key, may_be_float=True)
        return rows.pad(parts, int(key == "special_tokens_mask"))


def _length(value: Any) -> int:
    if isinstance(value, list | tuple):
        return -1 if value and isinstance(value[0], list | tuple) else len(value)
    shape: tuple[int, ...] = getattr(value, "shape", ())
    if len(shape) == 2 and shape[0] == 1:
        return shape[1]
    return shape[0] if len(shape) == 1 else -1
