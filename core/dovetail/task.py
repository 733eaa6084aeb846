"""What a model is trained for: modality, kind, and the tensors it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

TaskKind: TypeAlias = Literal[
    "classification",
    "multilabel",
    "regression",
    "causal_lm",
    "masked_lm",
    "seq2seq",
]
"""What the loss and the metrics are; `losses.py` holds one rule for each."""

LANGUAGE_KINDS: frozenset[str] = frozenset({"causal_lm", "masked_lm", "seq2seq"})
"""Kinds whose items are target tokens instead of samples."""

DType: TypeAlias = Literal[
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TensorSpec(_Frozen):
    """One named tensor of a model's signature."""

    name: str = Field(min_length=1)
    """Name of the forward parameter, or of the output."""
    dtype: DType = "float32"
    """Element type at the border of the exported model."""
    shape: tuple[PositiveInt | str, ...] = ()
    """Sizes; a name such as "batch" or "sequence" is a dimension that varies."""


class TaskSpec(_Frozen):
    """What a model is trained for."""

    name: str = Field(default="model", min_length=1)
    """Name of the task; it names the bundle. Data, never code: any characters are safe."""
    modality: str = Field(default="tabular", min_length=1)
    """What a sample is: "vision", "text", or any modality a collator claims."""
    kind: TaskKind = "classification"
    """What the loss is, and what an item of it is."""
    inputs: tuple[TensorSpec, ...] = ()
    """Tensors the model takes, by name. Empty: read from the model and the first batch."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of the model's outputs."""
    num_classes: PositiveInt | None = None
    """Number of classes, or of labels; the model must have as many outputs."""
    vocab_size: PositiveInt | None = None
    """Number of token ids of a language task; the model must have at least as many outputs."""

    @model_validator(mode="after")
    def _check_labels(self) -> TaskSpec:
        if self.labels and self.num_classes not in (None, len(self.labels)):
            raise ValueError(
                f"num_classes is {self.num_classes} but labels names {len(self.labels)} classes"
            )
        return self

    @property
    def class_count(self) -> int | None:
        """Number of classes where it is known."""
        return self.num_classes or len(self.labels) or None

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss is a mean over target tokens instead of samples."""
        return self.kind in LANGUAGE_KINDS

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values from which `from_dict` makes an equal spec."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskSpec:
        """Make a spec from what `to_dict` returned.

        Raises:
            pydantic.ValidationError: A field is unknown or has a value that does not fit.
        """
        return cls.model_validate(dict(data))

    @classmethod
    def lm_tiny(cls) -> TaskSpec:
        """Return the preset of a small causal language model."""
        return cls(
            name="lm_tiny",
            modality="text",
            kind="causal_lm",
            inputs=(_tokens("input_ids"), _tokens("attention_mask")),
            vocab_size=512,
        )

    @classmethod
    def cls_tiny(cls) -> TaskSpec:
        """Return the preset of a small text classifier."""
        return cls(
            name="cls_tiny",
            modality="text",
            kind="classification",
            inputs=(_tokens("input_ids"), _tokens("attention_mask")),
            num_classes=2,
            vocab_size=512,
        )

    @classmethod
    def seq2seq_tiny(cls) -> TaskSpec:
        """Return the preset of a small sequence-to-sequence model."""
        return cls(
            name="seq2seq_tiny",
            modality="text",
            kind="seq2seq",
            inputs=(
                _tokens("input_ids"),
                _tokens("attention_mask"),
                _tokens("decoder_input_ids", "target_sequence"),
            ),
            vocab_size=512,
        )

    @classmethod
    def vision_tiny(cls) -> TaskSpec:
        """Return the preset of a small image classifier."""
        return cls(
            name="vision_tiny",
            modality="vision",
            kind="classification",
            inputs=(TensorSpec(name="pixel_values", shape=("batch", 3, 32, 32)),),
            num_classes=10,
        )


def _tokens(name: str, dimension: str = "sequence") -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=("batch", dimension))
