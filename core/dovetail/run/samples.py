"""Real samples as batches of chosen sizes, for the export of a model and its proof."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from dovetail.run.naming import Batch, NamingCollator, name_tuple
from dovetail.types import Collator


def take_batches(
    split: Any, collator: Collator | None, name: str, sizes: Sequence[int]
) -> list[Batch]:
    """Return batches of real samples in the sizes asked for, on the CPU.

    Args:
        split: A data set, or a loader of the user's own.
        collator: Makes batches of samples; `None` for a loader of the user's own.
        name: Name of the input of tuple samples.
        sizes: Samples per batch; samples repeat where the split has too few.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if collator is None:
        rows = _take_rows(split, name, sum(sizes))
        return [
            {k: v[s : s + n] for k, v in rows.items()} for s, n in zip(starts, sizes, strict=True)
        ]
    if isinstance(split, IterableDataset):
        samples = list(itertools.islice(split, sum(sizes)))
    else:
        samples = [split[i % len(split)] for i in range(sum(sizes))]
    samples = [samples[i % len(samples)] for i in range(sum(sizes))]
    collate = NamingCollator(collator, name)
    return [collate(samples[s : s + n]) for s, n in zip(starts, sizes, strict=True)]


def _take_rows(loader: DataLoader[Any], name: str, count: int) -> Batch:
    """Return the first `count` rows of a loader's first batch, repeated where it has fewer."""
    batch = name_tuple(next(iter(loader)), name)
    num_rows = next(iter(batch.values())).shape[0]
    index = torch.arange(count) % num_rows
    return {key: value[index] for key, value in batch.items()}


def vary_lengths(batches: Sequence[Batch], name: str) -> list[Batch]:
    """Return batches of more than one sequence length, where all had the same.

    Samples of one fixed length say nothing about others, and an exported model is proven at other
    lengths than it was exported with. Every second batch is cut to half its length.

    Args:
        batches: Collated batches.
        name: The tokens, `(batch, sequence)`; whatever else is that long is cut with them.
    """
    lengths = {batch[name].shape[1] for batch in batches if batch[name].ndim == 2}
    if len(lengths) != 1 or (length := lengths.pop()) < 2:
        return list(batches)
    half = -(-length // 2)
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    # What is kept must not be the padding.
    is_left_padded = any(bool((mask[:, 0] == 0).any()) for mask in masks)
    kept = slice(-half, None) if is_left_padded else slice(half)
    return [
        {k: v[:, kept] if v.ndim > 1 and v.shape[1] == length else v for k, v in batch.items()}
        if index % 2
        else batch
        for index, batch in enumerate(batches)
    ]
