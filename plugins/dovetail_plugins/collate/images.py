"""Images of any kind as one batch: how they are read, stacked and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError, build_message
from dovetail_plugins.collate.buffers import new_tensor
from dovetail_plugins.collate.pixels import (
    CHANNEL_COUNTS,
    check_channels,
    check_same,
    dtype_message,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_TILE_ELEMENTS = 131_072  # half a MiB of float32: stays in a core's second-level cache
_PIL_MODES = ("L", "RGB", "RGBA")


@dataclass(frozen=True)
class Images:
    """The images of one batch, all of one shape and dtype, none of them copied."""

    arrays: Sequence[Array]
    """Each `(channel, height, width)`, or `(height, width, channel)` if `is_channels_last`."""
    is_channels_last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch, `(batch, channel, height, width)`."""
        shape = self.arrays[0].shape
        return (len(self.arrays), *((shape[2], *shape[:2]) if self.is_channels_last else shape))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the images."""
        return torch.from_numpy(np.empty(0, self.arrays[0].dtype)).dtype


def read_images(where: str, values: Sequence[Any], num_channels: int | None) -> Images:
    """Take images of any kind as arrays.

    Tensors have their channels first, PIL images last. NumPy arrays have them first where the
    first size is the expected number of channels, else last. Rank two is one channel.

    Args:
        where: Who asks, for the message.
        values: CPU tensors, NumPy arrays or PIL images.
        num_channels: Channels that the statistics are for; `None`: any number, where 1, 3 and 4
            are recognised.

    Raises:
        DataError: Something is not an image, shapes or dtypes disagree, or the number of channels
            is not the expected one.
    """
    if set(map(type, values)) == {np.ndarray} and len({value.shape for value in values}) == 1:
        arrays, is_last = list(values), _is_last(where, values[0], num_channels)
    else:
        read = [_read(where, index, value, num_channels) for index, value in enumerate(values)]
        is_last = all(last for _, last in read)
        arrays = [a.transpose(2, 0, 1) if last and not is_last else a for a, last in read]
    check_same("Inconsistent pixel_values shapes", where, {array.shape for array in arrays})
    check_same("Inconsistent pixel_values dtypes", where, {array.dtype for array in arrays})
    if arrays[0].dtype.kind not in "biuf":
        raise DataError(dtype_message(where, arrays[0].dtype))
    if arrays[0].ndim == 2:
        arrays = [array[None] for array in arrays]
    if not arrays[0].dtype.isnative:
        arrays = [array.astype(array.dtype.newbyteorder("=")) for array in arrays]
    return Images(arrays, is_last)


def check_pixel_dtype(where: str, images: Images) -> None:
    """Check that the images can be normalised.

    Raises:
        DataError: They are neither uint8 nor float.
    """
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise DataError(dtype_message(where, images.dtype))


def stack_images(
    images: Images,
    keep_layout: bool = False,
    empty: Callable[[Sequence[int], torch.dtype], Tensor] = new_tensor,
) -> Tensor:
    """Stack images as they are.

    Args:
        images: The images.
        keep_layout: Leave channels that come last where they are in memory; the sizes are the
            same, only the strides differ. Then stacking is a plain copy of memory.
        empty: Where the batch lies: returns a tensor of a shape and dtype.

    Returns:
        `(batch, channel, height, width)` in the images' dtype.
    """
    if not (images.is_channels_last and keep_layout):
        out = empty(images.shape, images.dtype)
        arrays = images.arrays
        if images.is_channels_last:
            arrays = [array.transpose(2, 0, 1) for array in arrays]
        np.stack(arrays, out=out.numpy())
        return out
    count, channels, height, width = images.shape
    out = empty((count, height, width, channels), images.dtype)
    np.concatenate(images.arrays, out=out.numpy().reshape(count * height, width, channels))
    return out.permute(0, 3, 1, 2)


def normalize_into(out: Tensor, images: Images, mean: Array, std: Array) -> None:
    """Stack and normalise in one pass over the output, a cache-sized tile at a time.

    NumPy computes it in the calling thread: on tiles of this size the threads of torch cost more
    than they save, and a loader's workers have one core each.

    Args:
        out: Written: `(batch, channel, height, width)`; float32 for uint8 images, else the
            images' own dtype.
        images: uint8 or float images.
        mean: float64 `(channel,)`, for images in 0..1.
        std: float64 `(channel,)`, likewise.
    """
    kind = images.arrays[0].dtype
    count, channels, *size = images.shape
    pixels = int(np.prod(size))
    unit = 255.0 if kind == np.uint8 else 1.0
    target = out.numpy().reshape(count, channels, pixels)
    # fp16 is computed in float32 and rounded once, at the end.
    work = np.float64 if kind == np.float64 else np.float32
    shift = (mean * unit).astype(work)[:, None]
    scale = (1.0 / (std * unit)).astype(work)[:, None]
    step = max(1, _TILE_ELEMENTS // max(1, channels * pixels))
    scratch = None if target.dtype == work else np.empty((step, channels, pixels), work)
    with np.errstate(over="ignore"):
        for start in range(0, count, step):
            tile = target[start : start + step]
            source = _tile(images, start, start + len(tile)).reshape(-1, *_flat(images, pixels))
            if images.is_channels_last:
                source = source.transpose(0, 2, 1)
            buffer = tile if scratch is None else scratch[: len(tile)]
            np.copyto(buffer, source)
            np.subtract(buffer, shift, out=buffer)
            np.multiply(buffer, scale, out=buffer)
            if scratch is not None:
                np.copyto(tile, buffer, casting="same_kind")


def _tile(images: Images, start: int, stop: int) -> Array:
    group = images.arrays[start:stop]
    return np.ascontiguousarray(group[0]) if len(group) == 1 else np.concatenate(group)


def _flat(images: Images, pixels: int) -> tuple[int, int]:
    channels = images.shape[1]
    return (pixels, channels) if images.is_channels_last else (channels, pixels)


def _read(where: str, index: int, value: Any, num_channels: int | None) -> tuple[Array, bool]:
    where = f"{where} samples[{index}]['pixel_values']"
    if isinstance(value, Tensor):
        check_channels(where, value.shape, num_channels)
        return value.detach().numpy(), False
    mode = getattr(value, "mode", None)
    if hasattr(value, "__array_interface__") and isinstance(mode, str):  # PIL, without importing it
        if mode not in _PIL_MODES:
            raise DataError(
                build_message(
                    where,
                    f"got a PIL image of mode {mode!r}",
                    f"a mode of {', '.join(_PIL_MODES)}",
                    "Convert it in the data set: image.convert('RGB').",
                )
            )
        array = np.asarray(value)
        check_channels(where, array.shape, num_channels, is_last=True)
        return array, array.ndim == 3
    if not isinstance(value, np.ndarray):
        raise DataError(
            build_message(
                where,
                f"got {type(value).__name__}",
                "a tensor, a NumPy array or a PIL image",
                "Convert it in the data set: numpy.asarray(image).",
            )
        )
    return value, _is_last(where, value, num_channels)


def _is_last(where: str, array: Array, num_channels: int | None) -> bool:
    if array.ndim != 3:
        check_channels(where, array.shape, num_channels)
        return False
    first, _, last = array.shape
    if num_channels is None:
        return first not in CHANNEL_COUNTS and last in CHANNEL_COUNTS
    if first == num_channels:
        return False
    # Where neither size fits, the smaller one is what was meant as the channels.
    is_last = bool(last == num_channels or last < first)
    check_channels(where, array.shape, num_channels, is_last)
    return is_last
