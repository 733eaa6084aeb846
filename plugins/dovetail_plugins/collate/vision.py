"""Stack images into batches and normalise them.

In a run the batches stay uint8, a quarter of the memory to copy, and are normalised on the
device by `PixelNormalize`, which is also the first layer of every exported artifact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, build_message
from dovetail_plugins.collate.buffers import BufferPool
from dovetail_plugins.collate.images import (
    check_pixel_dtype,
    normalize_into,
    read_images,
    stack_images,
)
from dovetail_plugins.collate.labels import read_columns, stack_labels, stack_values
from dovetail_plugins.collate.pixels import (
    PixelNormalize,
    check_channels,
    check_same,
    check_statistics,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dovetail import Collator, TaskSpec
    from dovetail.types import Sample

dovetail_api = 1

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
"""Mean of ImageNet's RGB channels in 0..1, the statistics most pretrained models expect."""
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's RGB channels in 0..1."""

_PIXELS = "pixel_values"


class VisionDataCollator:
    """Collates image samples into normalised batches.

    A sample is a mapping with `pixel_values`: a tensor `(channel, height, width)`, a NumPy array
    `(channel, height, width)` or `(height, width, channel)`, or a PIL image. `labels` and any
    other key are stacked. An array's first size wins where both could be the channels.

    uint8 images are scaled by 1/255 and become float32; float images keep their dtype and are
    taken to be in the range that `mean` and `std` are for.

    Args:
        normalize: Subtract `mean` and divide by `std`; `False` stacks the images as they are.
        mean: Mean per channel for images in 0..1; `None` for ImageNet's, three channels.
        std: Standard deviation per channel; `None` for ImageNet's.

    Raises:
        ConfigError: `mean` and `std` differ in length, or a `std` is not above 0.
    """

    def __init__(
        self,
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.normalize = normalize
        self.mean, self.std = check_statistics(
            type(self).__name__,
            IMAGENET_MEAN if mean is None else mean,
            IMAGENET_STD if std is None else std,
        )
        self._buffers = BufferPool()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order.

        Returns:
            `pixel_values` `(batch, channel, height, width)`; `labels` int64 `(batch,)`, float32
            `(batch,)` where they are fractions, float32 `(batch, labels)` where they are vectors;
            every other key stacked.

        Raises:
            DataError: There are no samples, they disagree in keys, shapes or dtypes, the channels
                do not fit `mean`, or a value cannot be a tensor.
        """
        name = type(self).__name__
        columns = read_columns(name, samples, (_PIXELS,))
        return {_PIXELS: self._pixels(columns.pop(_PIXELS)), **_rest(name, columns)}

    def _pixels(self, values: Sequence[Any]) -> Tensor:
        name = type(self).__name__
        if _needs_torch(values):
            pixels = _stack_tensors(name, values, len(self.mean) if self.normalize else None)
            return self._normalize(pixels) if self.normalize else pixels
        images = read_images(name, values, len(self.mean) if self.normalize else None)
        if not self.normalize:
            return stack_images(images)
        check_pixel_dtype(name, images)
        is_uint8 = images.dtype == torch.uint8
        out = self._buffers.take(images.shape, torch.float32 if is_uint8 else images.dtype)
        normalize_into(out, images, np.asarray(self.mean), np.asarray(self.std))
        return out

    def _normalize(self, pixels: Tensor) -> Tensor:
        normalized: Tensor = PixelNormalize(self.mean, self.std).to(pixels.device)(pixels)
        return normalized if pixels.dtype == torch.uint8 else normalized.to(pixels.dtype)


class VisionBatchCollator:
    """Stacks images and leaves their normalisation to `device_transform`.

    uint8 images stay uint8: stacking is a copy of memory, and a batch is a quarter of the size
    on its way to the device. Images whose channels come last keep that order in memory, so that
    `pixel_values` may have the strides of `torch.channels_last`; `device_transform` returns
    contiguous pixels.

    Args:
        device_transform: Normalises a batch on the device; `None` passes the pixels through.
        has_float_labels: Give whole-number labels as float32 too, for regression.
    """

    def __init__(
        self, device_transform: PixelNormalize | None = None, has_float_labels: bool = False
    ) -> None:
        self.device_transform = device_transform
        self.has_float_labels = has_float_labels
        self._buffers = BufferPool()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order.

        Returns:
            `pixel_values` `(batch, channel, height, width)` in the images' dtype; `labels` and
            every other key as `VisionDataCollator` gives them.

        Raises:
            DataError: As for `VisionDataCollator`.
        """
        name, transform = type(self).__name__, self.device_transform
        columns = read_columns(name, samples, (_PIXELS,))
        values = columns.pop(_PIXELS)
        num_channels = None if transform is None else len(transform.config["mean"])
        if _needs_torch(values):
            pixels = _stack_tensors(name, values, num_channels)
        else:
            images = read_images(name, values, num_channels)
            if transform is not None:
                check_pixel_dtype(name, images)
            keep_layout = transform is not None
            pixels = stack_images(images, keep_layout, self._buffers.take)
        return {_PIXELS: pixels, **_rest(name, columns, self.has_float_labels)}


class Options(PluginOptions):
    """Options of `[collate.vision]`."""

    normalize: bool = True
    """Normalise pixels with `mean` and `std`, on the device and in exported artifacts. uint8
    images are scaled to 0..1 first; float images must already lie there."""
    mean: tuple[float, ...] | None = None
    """Mean per channel of images in 0..1. Default: ImageNet's, for three channels; other images,
    grey ones too, need their own, such as `mean = [0.5]` with `std = [0.5]`."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel of images in 0..1. Default: ImageNet's."""

    @model_validator(mode="after")
    def _check_statistics(self) -> Options:
        check_statistics("config collate.vision", *self.statistics)
        return self

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, ImageNet's where none are given."""
        mean = IMAGENET_MEAN if self.mean is None else self.mean
        return mean, IMAGENET_STD if self.std is None else self.std


@hookimpl
def dovetail_collate(task: TaskSpec, options: Options) -> Collator | None:
    """Make the collator of an image task; `None` for another modality."""
    if task.modality != "vision":
        return None
    transform = None
    if options.normalize:
        transform = PixelNormalize(*options.statistics)
        _check_task_channels(task, len(options.statistics[0]))
    return VisionBatchCollator(transform, has_float_labels=task.kind == "regression")


def _check_task_channels(task: TaskSpec, num_channels: int) -> None:
    shape = next((spec.shape for spec in task.inputs if spec.name == _PIXELS), ())
    if len(shape) == 4 and isinstance(shape[1], int) and shape[1] != num_channels:
        example = [0.5] * shape[1]
        raise ConfigError(
            build_message(
                "config collate.vision.mean",
                f"Number of channels ({shape[1]}) doesn't match mean length ({num_channels})",
                f"one number per channel of task input {_PIXELS!r}",
                f"Set mean = {example} and std = {example}, or normalize = false.",
            )
        )


def _rest(
    where: str, columns: dict[str, list[Any]], has_float_labels: bool = False
) -> dict[str, Tensor]:
    return {
        key: stack_labels(where, values, has_float_labels)
        if key == "labels"
        else stack_values(where, key, values)
        for key, values in columns.items()
    }


def _needs_torch(values: Sequence[Any]) -> bool:
    # NumPy holds neither device memory nor bfloat16.
    return isinstance(values[0], Tensor) and any(
        isinstance(value, Tensor) and (value.device.type != "cpu" or value.dtype == torch.bfloat16)
        for value in values
    )


def _stack_tensors(where: str, values: Sequence[Tensor], num_channels: int | None) -> Tensor:
    check_same("Inconsistent pixel_values types", where, set(map(type, values)))
    check_same("Inconsistent pixel_values shapes", where, {value.shape for value in values})
    check_same("Inconsistent pixel_values dtypes", where, {value.dtype for value in values})
    check_channels(f"{where} samples[0][{_PIXELS!r}]", values[0].shape, num_channels)
    return stack_values(where, _PIXELS, [v[None] if v.ndim == 2 else v for v in values])
