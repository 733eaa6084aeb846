"""Handwritten digits: the data and the model of `digits.toml`.

The 1797 images are scikit-learn's bundled copy of the test part of the UCI set "Optical
Recognition of Handwritten Digits": 8 x 8 pixels that hold the counts 0 to 16. Nothing is
downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Digits(torch.utils.data.Dataset[dict[str, object]]):
    """Images and their digits, in memory.

    One tensor each, instead of one per sample: loader workers then share two blocks of memory
    and not thousands.

    Args:
        images: uint8 `(samples, 1, 8, 8)`, 0 is paper and 255 is ink.
        labels: int64 `(samples,)`, the digits 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        """Return `pixel_values`, uint8 `(1, 8, 8)`, and `labels`, an int."""
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def load_splits(validation_fraction: float = 0.2, seed: int = 0) -> dict[str, Digits]:
    """Split the digits into training and validation parts that never meet.

    Args:
        validation_fraction: Part of each class that is held out, between 0 and 1.
        seed: Seed of the split alone: the same images are held out whatever the run's seed is.

    Returns:
        The parts "train" and "validation".

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as err:
        # Here and not above: an exported model brings this file along, but not dovetail.
        from dovetail.errors import MissingDependencyError, build_message

        action = 'Run: pip install "dovetail[examples]"'
        message = build_message("example digits", "scikit-learn is not installed", action=action)
        raise MissingDependencyError(message) from err

    bunch = load_digits()
    # Counts 0 to 16 become 0 to 255 like any camera's bytes; rounding keeps the 17 levels apart.
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, validation = train_test_split(
        np.arange(len(labels)),
        test_size=validation_fraction,
        stratify=bunch.target,
        random_state=seed,
    )
    return {
        "train": Digits(images[train], labels[train]),
        "validation": Digits(images[validation], labels[validation]),
    }


class DigitNet(nn.Module):
    """A small convolutional network without batch statistics.

    Batch normalisation would tie a sample's output to the micro-batch it happens to share, and no
    accumulation can undo that; group normalisation looks at one sample only.

    Args:
        width: Channels of the first convolution, a multiple of 8; the others have twice as many.
        num_classes: Number of classes.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(2 * width * 2 * 2, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits `(batch, num_classes)` for normalised floats `(batch, 1, 8, 8)`."""
        features: Tensor = self.features(pixel_values)
        logits: Tensor = self.head(features.flatten(1))
        return logits


def _block(num_inputs: int, num_outputs: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(8, num_outputs),
        nn.ReLU(),
    )


def build_model(width: int = 32, num_classes: int = 10) -> DigitNet:
    """Build the network; see `DigitNet` for the arguments."""
    return DigitNet(width, num_classes)
