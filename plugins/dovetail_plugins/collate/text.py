"""Pad token sequences into batches and make the targets of language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)
from torch import Tensor

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, DataError, build_message
from dovetail_plugins.collate.masking import TokenMasker
from dovetail_plugins.collate.padding import IGNORED, Rows
from dovetail_plugins.collate.seq2seq import Seq2SeqCollator
from dovetail_plugins.collate.sequences import TokenCollator
from dovetail_plugins.collate.tokens import load_tokenizer

if TYPE_CHECKING:
    from dovetail import Collator, TaskSpec
    from dovetail.types import Sample

dovetail_api = 1

_WHERE = "config collate.text"


class LanguageModelingDataCollator(TokenCollator):
    """Collates token samples and makes the labels of a language model.

    Causal: the labels are the tokens, not shifted (the loss shifts), or the samples' own `labels`,
    one per token. Masked: 15 % of the tokens are to be guessed; of these 80 % are masked, 10 %
    random, 10 % unchanged, and special tokens are never among them.

    The attention mask comes from the lengths of the sequences, or from the samples' own
    `attention_mask`; never from the padding id, which may be a token like any other.

    Args:
        tokenizer: Knows the padding id and, for masking, the mask token, the special tokens and
            the size of the vocabulary; encodes samples of raw `text`.
        mlm: Masked instead of causal.
        mlm_probability: Share of the tokens to guess, in (0, 1].
        padding_side: "left" or "right".
        mask_padding_labels: Label padding with -100, which no loss counts, else with the padding
            id. Tokens that a masked model need not guess are always -100.
        seed: For masking, see `TokenMasker`; `None` for torch's own generator.
        **padding: `pad_token_id`, `pad_to_multiple_of`, `max_length` and `vocab_size`, as for
            `TokenCollator`.

    Raises:
        ConfigError: There is no tokenizer, it cannot mask, or an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm: bool = False,
        mlm_probability: float = 0.15,
        padding_side: str = "right",
        *,
        mask_padding_labels: bool = True,
        seed: int | None = None,
        **padding: Any,
    ) -> None:
        if tokenizer is None and (mlm or padding.get("pad_token_id") is None):
            raise ConfigError(
                build_message(
                    f"{type(self).__name__} tokenizer",
                    "tokenizer is required, got None",
                    "a tokenizer" if mlm else "a tokenizer, or pad_token_id for samples of ids",
                    'Set collate.text.tokenizer to "tokenizer.json" or "module:function".',
                )
            )
        super().__init__(tokenizer, padding_side=padding_side, **padding)
        self.mlm = mlm
        self.mlm_probability = mlm_probability
        self.mask_padding_labels = mask_padding_labels
        self.masker = self._build_masker(seed) if mlm else None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 `(batch, width)`; every other key.

        Raises:
            DataError: There are no samples, they disagree in keys, or a value does not fit.
        """
        columns, rows = self.read(samples)
        if self.masker is None:
            seen, labels = rows.parts, self._causal_labels(columns, rows)
        else:
            masked = self.masker(rows.flat, self._is_special(columns, rows))
            seen, labels = (rows.split(flat) for flat in masked)
        is_kept = self.masker is None and not self.mask_padding_labels
        return {
            "input_ids": rows.pad(seen, self.pad_token_id),
            **self.rest(columns, rows),
            "labels": rows.pad(labels, self.pad_token_id if is_kept else IGNORED),
        }

    def _build_masker(self, seed: int | None) -> TokenMasker:
        vocabulary = self.vocabulary
        assert vocabulary is not None
        return TokenMasker(
            vocabulary.mask_id,
            vocabulary.special_ids,
            self.vocab_size or vocabulary.size,
            self.mlm_probability,
            seed,
        )

    def _causal_labels(self, columns: dict[str, list[Any]], rows: Rows) -> list[Any]:
        labels = self.per_token(columns, "labels", rows) if "labels" in columns else rows.parts
        if "attention_mask" not in columns or not self.mask_padding_labels:
            return labels
        masks = self.per_token(columns, "attention_mask", rows)
        return [np.where(m == 0, IGNORED, part) for m, part in zip(masks, labels, strict=True)]

    def _is_special(self, columns: dict[str, list[Any]], rows: Rows) -> Any:
        assert self.masker is not None
        assert self.vocabulary is not None
        if "labels" in columns:
            self._check_redundant(columns, rows)
        special = np.isin(rows.flat, self.masker.special)
        if "special_tokens_mask" in columns:
            marks = self.per_token(columns, "special_tokens_mask", rows)
            special |= np.concatenate(marks) != 0
        elif marks := self.vocabulary.special_mask(rows.parts) or []:
            special |= np.concatenate(marks) != 0
        if "attention_mask" in columns:
            special |= np.concatenate(self.per_token(columns, "attention_mask", rows)) == 0
        return special

    def _check_redundant(self, columns: dict[str, list[Any]], rows: Rows) -> None:
        labels = np.concatenate(self.per_token(columns, "labels", rows))
        if not np.array_equal(labels, rows.flat):
            raise DataError(
                build_message(
                    f"{self.name} samples[...]['labels']",
                    "the samples bring labels of their own",
                    "none, or a copy of input_ids: masking makes the labels",
                    "Leave the key out in the data set, or set mlm = false.",
                )
            )


class Options(PluginOptions):
    """Options of `[collate.text]`."""

    tokenizer: str | None = None
    """The tokenizer: `module:function`, where the function returns it, or the path of a
    `tokenizer.json`; both are looked for beside the config file. Needed for language models and
    for samples of raw text."""
    mlm: bool | None = None
    """Masked language model instead of a causal one. Default: what the task's kind says."""
    mlm_probability: float = Field(default=0.15, gt=0, le=1)
    """Share of the tokens a masked language model guesses."""
    padding_side: Literal["left", "right"] = "right"
    """Side of the padding; targets of a seq2seq task are always padded on the right."""
    pad_token_id: NonNegativeInt | None = None
    """Id that fills up short sequences. Default: the tokenizer's, or 0."""
    decoder_start_token_id: NonNegativeInt | None = None
    """First token a seq2seq decoder reads. Default: the padding id."""
    pad_to_multiple_of: PositiveInt | None = None
    """Pad every batch to a multiple of this many tokens. Default: to its longest sequence."""
    max_length: PositiveInt | None = None
    """Cut longer sequences to their first so many tokens. Default: never."""
    mask_padding_labels: bool = True
    """Label padding with -100, so that no loss counts it; `false` labels it with the padding id."""
    seed: int | None = None
    """Seed of the masking alone. Default: the run's random state, which differs by worker and
    epoch and is restored when a run resumes."""
    _config_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _remember_folder(self, info: ValidationInfo) -> Options:
        folder = (info.context or {}).get("config_dir")
        self._config_dir = None if folder is None else Path(folder)
        return self

    def build_tokenizer(self) -> Any:
        """Load the tokenizer; `None` where none is named.

        Raises:
            ConfigError: It is not there.
            MissingDependencyError: It needs a package that is not installed.
        """
        if self.tokenizer is None:
            return None
        return load_tokenizer(self.tokenizer, f"{_WHERE}.tokenizer", self._config_dir)


@hookimpl
def dovetail_collate(task: TaskSpec, options: Options) -> Collator | None:
    """Make the collator of a text task; `None` for another modality."""
    if task.modality != "text":
        return None
    is_masked = task.kind == "masked_lm"
    if options.mlm not in (None, is_masked):
        raise ConfigError(
            build_message(
                f"{_WHERE}.mlm",
                f"got {options.mlm} for a task of kind {task.kind!r}",
                "what the kind says",
                "Remove the key, or set task.kind to masked_lm or causal_lm.",
            )
        )
    padding: dict[str, Any] = {
        "padding_side": options.padding_side,
        "pad_token_id": options.pad_token_id,
        "pad_to_multiple_of": options.pad_to_multiple_of,
        "max_length": options.max_length,
        "vocab_size": task.vocab_size,
    }
    tokenizer = options.build_tokenizer()
    if task.kind in ("causal_lm", "masked_lm"):
        return LanguageModelingDataCollator(
            tokenizer,
            mlm=is_masked,
            mlm_probability=options.mlm_probability,
            mask_padding_labels=options.mask_padding_labels,
            seed=options.seed,
            **padding,
        )
    if task.kind == "seq2seq":
        return Seq2SeqCollator(
            tokenizer,
            decoder_start_token_id=options.decoder_start_token_id,
            mask_padding_labels=options.mask_padding_labels,
            **padding,
        )
    return TokenCollator(tokenizer, has_float_labels=task.kind == "regression", **padding)
