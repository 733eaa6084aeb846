"""A tiny language model of Python: the data, the tokenizer and the model of `tinylm.toml`.

The text is the source of the running interpreter's own standard library, so nothing is
downloaded. Other Python versions have slightly other sources and therefore slightly other losses.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINING_MODULES = (
    *("argparse", "ast", "calendar", "cmd", "configparser", "contextlib", "copy", "csv"),
    *("dataclasses", "enum", "functools", "gettext", "inspect", "ipaddress", "os", "pickle"),
    *("random", "socket", "tempfile", "traceback", "weakref"),
)
"""One file each, and in the library of every Python from 3.10 on."""

VALIDATION_MODULES = ("fractions", "heapq", "shutil", "textwrap")
"""Held out whole: a random split would put halves of one function into both parts."""

PAD, BOS = "<pad>", "<bos>"

TokenIds = npt.NDArray[np.int64]


def read_sources(modules: Sequence[str]) -> list[str]:
    """Return the source text of standard-library modules, in the order given.

    Raises:
        FileNotFoundError: This Python came without the source of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    return [(library / f"{name}.py").read_text(encoding="utf-8") for name in modules]


@cache
def build_tokenizer(vocab_size: int = 768) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the training modules.

    The same sources give the same tokenizer in every process. It is trained once per process.

    Args:
        vocab_size: Token ids, at least 258: 256 bytes, `<pad>` (id 0) and `<bos>` (id 1).

    Raises:
        MissingDependencyError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    except ModuleNotFoundError as err:
        # Here and not above: an exported model brings this file along, but not dovetail.
        from dovetail.errors import MissingDependencyError, build_message

        action = 'Run: pip install "dovetail[text]"'
        message = build_message("example tinylm", "tokenizers is not installed", action=action)
        raise MissingDependencyError(message) from err

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_sources(TRAINING_MODULES), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def load_splits(
    vocab_size: int = 768, min_tokens: int = 32, max_tokens: int = 256
) -> dict[str, list[dict[str, TokenIds]]]:
    """Cut the sources into samples and print the loss of a model that only counts tokens.

    A sample is `<bos>` and a group of paragraphs, so lengths vary as they do in real text.

    Args:
        vocab_size: Token ids of the tokenizer.
        min_tokens: A paragraph shorter than this is joined with the next.
        max_tokens: A paragraph longer than this is cut.

    Returns:
        The parts "train" and "validation": samples with `input_ids`, int64 `(length,)`.
    """
    tokenizer = build_tokenizer(vocab_size)
    train, validation = (
        [
            sample
            for source in read_sources(modules)
            for sample in cut_source(source, tokenizer, min_tokens, max_tokens)
        ]
        for modules in (TRAINING_MODULES, VALIDATION_MODULES)
    )
    # Boilerplate that stands in both parts would be scored as if it had been understood.
    seen = {sample.tobytes() for sample in train}
    validation = [sample for sample in validation if sample.tobytes() not in seen]
    entropy = unigram_entropy(train, validation, vocab_size)
    print(
        f"tinylm: {len(train)} training samples with {sum(map(len, train))} tokens, "
        f"{len(validation)} validation samples with {sum(map(len, validation))}; "
        f"counting tokens alone gives a validation loss of {entropy:.3f} nats per token"
    )
    return {
        "train": [{"input_ids": sample} for sample in train],
        "validation": [{"input_ids": sample} for sample in validation],
    }


def cut_source(
    source: str, tokenizer: Tokenizer, min_tokens: int, max_tokens: int
) -> Iterator[TokenIds]:
    """Yield the samples of one file, each int64 `(length,)`.

    Lengths, `<bos>` included, are `min_tokens` to `max_tokens`; a shorter rest is dropped.
    """
    bos = tokenizer.token_to_id(BOS)
    block = [bos]
    for paragraph in re.findall(r".+?(?:\n{2,}|\Z)", source, flags=re.DOTALL):
        block += tokenizer.encode(paragraph, add_special_tokens=False).ids
        while len(block) > max_tokens:
            yield np.array(block[:max_tokens], dtype=np.int64)
            block = [bos, *block[max_tokens:]]
        if len(block) >= min_tokens:
            yield np.array(block, dtype=np.int64)
            block = [bos]


def unigram_entropy(
    train: Sequence[TokenIds], validation: Sequence[TokenIds], vocab_size: int
) -> float:
    """Return the validation loss of a model that knows how often each token occurs, in nats.

    It is the cross entropy of the validation tokens under the token frequencies of the training
    part, with one added to every count (Laplace's rule), over the tokens that a language model
    predicts: all but the first of each sample. A model whose loss is lower uses the context.

    Args:
        train: Samples to count, int64 `(length,)` each.
        validation: Samples to score, int64 `(length,)` each.
        vocab_size: Number of token ids.
    """
    counts = _count_targets(train, vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    occurrences = _count_targets(validation, vocab_size)
    return float(-(occurrences * log_probabilities).sum() / occurrences.sum())


def _count_targets(samples: Sequence[TokenIds], vocab_size: int) -> TokenIds:
    return np.bincount(np.concatenate([s[1:] for s in samples]), minlength=vocab_size)


class TinyLM(nn.Module):
    """A causal transformer: pre-norm blocks, rotary positions, input and output share weights.

    Positions enter only as differences, so that padding on the left moves nothing and no length
    is too long.

    Args:
        vocab_size: Number of token ids.
        width: Channels of a token, a multiple of twice `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads per block.
    """

    def __init__(self, vocab_size: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(_init_weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits for the token that follows each position.

        Args:
            input_ids: int64 `(batch, sequence)`.
            attention_mask: `(batch, sequence)`, zero at padding on either side; `None` for none.

        Returns:
            Logits `(batch, sequence, vocab_size)`; finite at padding, where they mean nothing.
        """
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = position.unsqueeze(1) - position
        mask = distance >= 0
        if attention_mask is not None:
            # A padded position still sees itself: a softmax over nothing would be NaN.
            is_token = attention_mask.bool().unsqueeze(1).unsqueeze(1)
            mask = mask & (is_token | (distance == 0))
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, position, mask)
        return F.linear(self.norm(hidden), self.embedding.weight)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Return `(batch, sequence, width)` for the same.

        Args:
            hidden: `(batch, sequence, width)`.
            position: int64 `(sequence,)`.
            mask: bool, broadcastable to `(batch, head, sequence, sequence)`; true may be seen.
        """
        heads = self.projection(self.attention_norm(hidden)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(
            rotate(query, position), rotate(key, position), value, attn_mask=mask
        )
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        result: Tensor = hidden + self.feed_forward(hidden)
        return result


def rotate(heads: Tensor, position: Tensor) -> Tensor:
    """Turn pairs of channels by angles that grow with the position.

    Args:
        heads: Queries or keys, `(batch, head, sequence, channel)`, an even number of channels.
        position: int64 `(sequence,)`.

    Source:
        Su et al., RoFormer, arXiv:2104.09864, equation 34.
    """
    half = heads.shape[-1] // 2
    exponent = torch.arange(half, device=heads.device, dtype=torch.float32) / half
    angle = position.unsqueeze(1) * torch.exp(exponent * -math.log(10_000.0))
    cosine, sine = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        # The embedding is the output layer too: its default scale of 1 would start far off.
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def build_model(
    vocab_size: int = 768, width: int = 96, depth: int = 2, num_heads: int = 4
) -> TinyLM:
    """Build the model; see `TinyLM` for the arguments."""
    return TinyLM(vocab_size, width, depth, num_heads)
