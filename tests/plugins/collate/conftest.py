from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

WORDS = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(95))]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def word_tokenizer():
    """A `tokenizers.Tokenizer` of 100 words; ids 0 to 4 are special."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture
def hf_tokenizer(word_tokenizer):
    """The same words as a fast tokenizer of transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


@pytest.fixture
def plain_tokenizer():
    """The least a tokenizer can be: a few ids."""
    return SimpleNamespace(
        pad_token_id=0, mask_token_id=1, all_special_ids=[0, 1, 2], vocab_size=50
    )
