"""Batches of sequence pairs: tokens to read and tokens to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail_plugins.collate.padding import IGNORED, PaddingRule, Rows
from dovetail_plugins.collate.sequences import TokenCollator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dovetail.types import Sample


class Seq2SeqCollator(TokenCollator):
    """Collates pairs of sequences: tokens to read and `labels`, the tokens to write.

    `labels` may be raw text too. They are padded on the right, whatever the side of the tokens to
    read is. `decoder_input_ids` are the labels one place to the right, unless the samples bring
    their own; any key `decoder_...` is padded on the right.

    Args:
        tokenizer: As for `TokenCollator`.
        decoder_start_token_id: First token of `decoder_input_ids`; `None` for the padding id.
        mask_padding_labels: Label padding with -100, which no loss counts, else with the padding
            id.
        **padding: The other arguments of `TokenCollator`.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        decoder_start_token_id: int | None = None,
        mask_padding_labels: bool = True,
        **padding: Any,
    ) -> None:
        super().__init__(tokenizer, **padding)
        self.target_rule = PaddingRule("right", self.rule.multiple, self.rule.max_length)
        start = self.pad_token_id if decoder_start_token_id is None else decoder_start_token_id
        self.decoder_start_token_id = start
        self.mask_padding_labels = mask_padding_labels

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order.

        Returns:
            `input_ids` and `attention_mask`, int64 `(batch, width)`; `decoder_input_ids` and
            `labels`, int64 `(batch, target_width)`; every other key.

        Raises:
            DataError: There are no samples, they disagree in keys, or a value does not fit.
        """
        columns, rows = self.read(samples)
        # The decoder's keys go with the tokens to write, not with those to read.
        written = [key for key in columns if key == "labels" or key.startswith("decoder_")]
        targets = {key: self._target(columns.pop(key), key) for key in written}
        batch = {"input_ids": rows.pad(rows.parts, self.pad_token_id), **self.rest(columns, rows)}
        labels = targets.pop("labels", None)
        for key, target in targets.items():
            is_ids = key == "decoder_input_ids"
            batch[key] = target.pad(target.parts, self.pad_token_id if is_ids else 0)
        if labels is not None:
            self.check_ids(labels, "labels")
            if "decoder_input_ids" not in batch:
                batch["decoder_input_ids"] = self._shifted(labels)
            fill = IGNORED if self.mask_padding_labels else self.pad_token_id
            batch["labels"] = labels.pad(labels.parts, fill)
        return batch

    def _target(self, values: list[Any], key: str) -> Rows:
        if all(isinstance(value, str) for value in values):
            values = self.encode(values, key)
        return Rows(values, self.target_rule, self.name, key)

    def _shifted(self, target: Rows) -> Tensor:
        shifted = target.pad(target.parts, self.pad_token_id)
        # A decoder cannot embed -100: what the samples' labels ignore is padding to it.
        shifted[shifted == IGNORED] = self.pad_token_id
        shifted[:, 1:] = shifted[:, :-1].clone()
        shifted[:, 0] = self.decoder_start_token_id
        return shifted
