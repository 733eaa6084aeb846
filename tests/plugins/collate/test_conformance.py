"""The built-in collators keep the contract of their hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dovetail import TaskSpec
from dovetail.testing import CollatorSuite

RNG = np.random.default_rng(5)
LENGTHS = (5, 9, 3)


class TestVisionOfBytes(CollatorSuite):
    backend = "vision"
    task = TaskSpec.vision_tiny()
    samples = [
        {"pixel_values": RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8), "labels": label}
        for label in range(3)
    ]


class TestVisionOfFloats(CollatorSuite):
    backend = "vision"
    options = {"mean": [0.5], "std": [0.25]}
    task = TaskSpec(modality="vision", kind="multilabel", num_classes=2)
    samples = [
        {
            "pixel_values": torch.rand(1, 6, 8),
            "labels": [label % 2, 1],
            "weight": 0.5 + label,
            "box": np.full(4, label, np.float64),
        }
        for label in range(3)
    ]
    test_works_in_a_spawned_worker = None  # once is enough for a class


class TestVisionWithoutNormalization(CollatorSuite):
    backend = "vision"
    options = {"normalize": False}
    task = TaskSpec(modality="vision", kind="regression")
    samples = [{"pixel_values": torch.rand(2, 6, 8), "labels": label} for label in (0.25, 1.5, 3.0)]
    test_works_in_a_spawned_worker = None  # once is enough for a class


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """The path of a tokenizer of 100 words; ids 0 to 4 are special."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(95))]
    tokenizer = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(words[:5])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def tokens(length: int) -> list[int]:
    return RNG.integers(5, 100, length).tolist()


class TestCausalText(CollatorSuite):
    backend = "text"
    options = {"pad_token_id": 0, "padding_side": "left"}
    task = TaskSpec.lm_tiny()
    samples = [
        {"input_ids": tokens(n), "token_type_ids": [1] * n, "source": i}
        for i, n in enumerate(LENGTHS)
    ]
    test_works_in_a_spawned_worker = None  # once is enough for a class

    @pytest.fixture(autouse=True)
    def with_tokenizer(self, tokenizer_json):
        self.options = {**self.options, "tokenizer": tokenizer_json}


class TestRawText(CollatorSuite):
    backend = "text"
    options = {"pad_to_multiple_of": 4}
    task = TaskSpec.lm_tiny()
    samples = [{"text": " ".join(f"w{i}" for i in range(n)), "source": n} for n in LENGTHS]
    consumed_keys = ["text"]
    test_works_in_a_spawned_worker = None  # once is enough for a class

    @pytest.fixture(autouse=True)
    def with_tokenizer(self, tokenizer_json):
        self.options = {**self.options, "tokenizer": tokenizer_json}


class TestMaskedText(CollatorSuite):
    backend = "text"
    task = TaskSpec(modality="text", kind="masked_lm", vocab_size=100)
    samples = [{"input_ids": np.array(tokens(n)), "source": n} for n in LENGTHS]
    is_random = True

    @pytest.fixture(autouse=True)
    def with_tokenizer(self, tokenizer_json):
        self.options = {"tokenizer": tokenizer_json}


class TestMaskedTextWithSeed(TestMaskedText):
    test_works_in_a_spawned_worker = None  # once is enough for a class

    @pytest.fixture(autouse=True)
    def with_tokenizer(self, tokenizer_json):
        self.options = {"tokenizer": tokenizer_json, "seed": 3}


class TestTextClassification(CollatorSuite):
    backend = "text"
    task = TaskSpec.cls_tiny()
    samples = [{"input_ids": torch.tensor(tokens(n)), "labels": n % 2} for n in LENGTHS]
    test_works_in_a_spawned_worker = None  # once is enough for a class


class TestSeq2Seq(CollatorSuite):
    backend = "text"
    options = {"pad_token_id": 0, "decoder_start_token_id": 1}
    task = TaskSpec.seq2seq_tiny()
    samples = [{"input_ids": tokens(n), "labels": tokens(12 - n), "weight": n / 2} for n in LENGTHS]


class TestTabular(CollatorSuite):
    backend = "tabular"
    task = TaskSpec(num_classes=3)
    samples = [
        {"features": [0.5 * i, 1.0], "counts": np.arange(2) + i, "price": 1.5 * i, "labels": i}
        for i in range(3)
    ]


class TestTabularRegression(CollatorSuite):
    backend = "tabular"
    task = TaskSpec(kind="regression")
    samples = [
        {"features": torch.full((3,), float(i)).double(), "is_new": bool(i % 2), "labels": i}
        for i in range(3)
    ]
    test_works_in_a_spawned_worker = None  # once is enough for a class
