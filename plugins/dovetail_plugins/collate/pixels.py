"""The statistics of images and the module that normalises with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dovetail.errors import ConfigError, DataError, build_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


CHANNEL_COUNTS = (1, 3, 4)
"""Numbers of channels an image commonly has: grey, RGB, RGBA."""


def check_statistics(
    where: str, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return `mean` and `std` as plain floats, one per channel.

    Raises:
        ConfigError: Their lengths differ, they are empty, or a `std` is not above 0.
    """
    means, stds = tuple(float(v) for v in mean), tuple(float(v) for v in std)
    if len(means) != len(stds) or not means:
        raise ConfigError(
            build_message(
                f"{where} mean, std",
                f"got {len(means)} means {means} and {len(stds)} standard deviations {stds}",
                "mean and std must have same length, one number per channel",
                "Give both, or neither for the ImageNet values of RGB images.",
            )
        )
    if not all(map(math.isfinite, means)) or not all(0 < v < math.inf for v in stds):
        raise ConfigError(
            build_message(
                f"{where} mean, std",
                f"got mean {means} and std {stds}",
                "finite means, and standard deviations above 0",
                "Compute them over the training images, scaled to 0..1.",
            )
        )
    return means, stds


class PixelNormalize(nn.Module):
    """Turns pixels into normalised float32: the tensor half of image preprocessing.

    `(x - mean) / std` per channel, where uint8 pixels are first scaled by 1/255 and float pixels
    are taken as they are, in 0..1 by convention. It has no parameters and nothing in its
    `state_dict`; its buffers follow `.to(device)`.

    Args:
        mean: Mean per channel of images in 0..1.
        std: Standard deviation per channel of images in 0..1.

    Raises:
        ConfigError: `mean` and `std` do not fit together.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._mean, self._std = check_statistics(type(self).__name__, mean, std)
        self.register_buffer("mean", _per_channel(self._mean), persistent=False)
        self.register_buffer("std", _per_channel(self._std), persistent=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """Arguments that build an equal module, as JSON values."""
        return {"mean": list(self._mean), "std": list(self._std)}

    def _apply(self, fn: Any, recurse: bool = True) -> PixelNormalize:
        # `model.half()` must not round the statistics: pixels are normalised in float32. The
        # method of nn.Module is typed in some releases of torch only.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        device = self.mean.device
        self.mean = _per_channel(self._mean).to(device)
        self.std = _per_channel(self._std).to(device)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return normalised pixels.

        Args:
            pixels: uint8 in 0..255 or float in 0..1, `(batch, channel, height, width)`.

        Returns:
            float32 of the same shape, contiguous.

        Raises:
            DataError: The pixels are neither uint8 nor float, or have another number of channels.
        """
        # One channel would be broadcast to all without a word.
        check_channels(f"{type(self).__name__} pixel_values", pixels.shape[-3:], len(self._mean))
        # One subtraction and one product over the image, whatever the dtype was.
        if pixels.dtype == torch.uint8:
            shift, scale = self.mean * 255.0, 1.0 / (self.std * 255.0)
        elif pixels.is_floating_point():
            shift, scale = self.mean, 1.0 / self.std
        else:
            raise DataError(dtype_message(type(self).__name__, pixels.dtype))
        return (pixels.contiguous().to(torch.float32) - shift) * scale


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def dtype_message(where: str, found: object) -> str:
    """Return the message for pixels that are neither uint8 nor float."""
    return build_message(
        f"{where} pixel_values",
        f"got {found} pixels",
        "uint8 in 0..255 or float in 0..1",
        "Convert them in the data set; for 16-bit images divide by 65535.",
    )


def check_channels(
    where: str, shape: Sequence[int], num_channels: int | None, is_last: bool = False
) -> None:
    """Check the shape of one image.

    Args:
        where: Who asks, for the message.
        shape: `(channel, height, width)`, or `(height, width)` of one channel.
        num_channels: Channels that the statistics are for; `None` expects nothing.
        is_last: `(height, width, channel)` instead.

    Raises:
        DataError: It has another rank, or not as many channels.
    """
    if num_channels is None:
        return
    if len(shape) not in (2, 3):
        raise DataError(
            build_message(
                where,
                f"got an image of shape {tuple(shape)}",
                "(channel, height, width)",
                "Reshape it in the data set, or do not normalise.",
            )
        )
    found = 1 if len(shape) == 2 else shape[2 if is_last else 0]
    if found == num_channels:
        return
    if found in CHANNEL_COUNTS:
        action = f"Give one mean and std per channel (mean={(0.5,) * found}, say), or convert."
    else:
        action = "Move the channels first: tensor.permute(2, 0, 1)."
    raise DataError(
        build_message(
            where,
            f"Number of channels ({found}) doesn't match mean length ({num_channels})",
            f"images (channel, height, width) of {num_channels} channel(s)",
            action,
        )
    )


def check_same(title: str, where: str, found: set[Any]) -> None:
    """Check that all images of a batch have one shape, or dtype, in common.

    Raises:
        DataError: They have several.
    """
    if len(found) > 1:
        raise DataError(
            build_message(
                where,
                f"{title}: {', '.join(sorted(map(str, found)))}",
                "the same in every sample of a batch",
                "Resize or convert the images in the data set.",
            )
        )
