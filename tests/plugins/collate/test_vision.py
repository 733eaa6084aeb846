from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dovetail import Collator, TaskSpec, TensorSpec
from dovetail.errors import ConfigError, DataError
from dovetail_plugins.collate.pixels import PixelNormalize
from dovetail_plugins.collate.vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Options,
    VisionDataCollator,
    dovetail_collate,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
VISION = TaskSpec(modality="vision")


def exact(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalise `(..., channel, height, width)` in float64, by the book."""
    values = torch.as_tensor(np.asarray(pixels))
    values = values.double() / (255 if values.dtype == torch.uint8 else 1)
    shape = (-1, 1, 1)
    return (values - torch.tensor(mean).double().view(shape)) / torch.tensor(std).double().view(
        shape
    )


def images(rng, count=3, size=(5, 7), channels=3):
    return [rng.integers(0, 256, (*size, channels), dtype=np.uint8) for _ in range(count)]


def samples(pixels, **rest):
    return [
        {"pixel_values": image, **{key: values[i] for key, values in rest.items()}}
        for i, image in enumerate(pixels)
    ]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 5),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 999),
)
def test_collator_equals_torchvision_normalize(count, size, channels, seed):
    normalize = pytest.importorskip("torchvision").transforms.Normalize
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, channels, *size, generator=generator) * 3 - 1
    mean, std = (*IMAGENET_MEAN, 0.3), (*IMAGENET_STD, 0.5)
    mean, std = mean[:channels], std[:channels]

    batch = VisionDataCollator(mean=mean, std=std)(samples(list(pixels)))

    torch.testing.assert_close(batch["pixel_values"], normalize(mean, std)(pixels), **CLOSE)


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (230, 200)])
def test_collator_equals_torchvision_when_images_are_uint8(rng, size):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    pixels = images(rng, count=20, size=size)

    batch = VisionDataCollator()(samples(pixels))

    expected = torch.stack([transform(image) for image in pixels])
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous()
    torch.testing.assert_close(batch["pixel_values"], expected, **CLOSE)


def test_collator_reads_every_kind_of_image_alike(rng):
    pil = pytest.importorskip("PIL.Image")
    pixels = images(rng)
    first = [np.ascontiguousarray(image.transpose(2, 0, 1)) for image in pixels]
    collate = VisionDataCollator()
    expected = exact(np.stack(first)).float()

    for kind in (
        pixels,
        first,
        [torch.from_numpy(image) for image in first],
        [pil.fromarray(image) for image in pixels],
        [pixels[0], torch.from_numpy(first[1]), pil.fromarray(pixels[2])],
        [image.transpose(2, 0, 1) for image in pixels],
        [image[::-1, ::-1][::-1, ::-1] for image in pixels],
    ):
        torch.testing.assert_close(collate(samples(kind))["pixel_values"], expected, **CLOSE)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-7)],
)
def test_collator_keeps_dtype_when_images_are_float(dtype, tolerance):
    pixels = torch.rand(4, 3, 6, 5).to(dtype)

    result = VisionDataCollator()(samples(list(pixels)))["pixel_values"]

    assert result.dtype == dtype
    expected = exact(pixels.double().numpy())
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_collator_rounds_fp16_once():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()

    result = VisionDataCollator()(samples(list(pixels)))["pixel_values"]

    # Half a unit in the last place: fp16 has 11 bits.
    torch.testing.assert_close(result.double(), exact(pixels.numpy()), rtol=1.01 / 2**11, atol=1e-6)


@pytest.mark.parametrize("value", [1000.0, 1e-10, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_collator_stays_finite_when_values_are_extreme(value, dtype):
    pixels = [torch.full((3, 2, 2), value, dtype=dtype)] * 2

    assert VisionDataCollator()(samples(pixels))["pixel_values"].isfinite().all()


def test_collator_leaves_images_unchanged(rng):
    pixels = [*images(rng), rng.random((3, 4, 4), dtype=np.float32)]
    copies = [image.copy() for image in pixels]
    collate = VisionDataCollator()

    collate(samples(pixels[:3]))
    collate(samples(pixels[3:]))

    assert all(np.array_equal(a, b) for a, b in zip(pixels, copies, strict=True))


def test_collator_passes_pixels_through_when_not_normalizing(rng):
    pixels = images(rng)

    result = VisionDataCollator(normalize=False)(samples(pixels))["pixel_values"]

    assert result.dtype == torch.uint8
    assert torch.equal(result, torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()))
    vectors = torch.rand(3, 11)
    result = VisionDataCollator(normalize=False)(samples(list(vectors)))
    assert torch.equal(result["pixel_values"], vectors)


def test_collator_takes_one_channel(rng):
    collate = VisionDataCollator(mean=[0.5], std=[0.25])
    grey = images(rng, channels=1)
    expected = exact(np.stack([g.transpose(2, 0, 1) for g in grey]), (0.5,), (0.25,)).float()

    for kind in (grey, [image[..., 0] for image in grey]):
        torch.testing.assert_close(collate(samples(kind))["pixel_values"], expected, **CLOSE)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], None), (None, [0.5]), ([0.5, 0.5], [0.5]), ([], [])]
)
def test_collator_refuses_mean_and_std_when_lengths_differ(mean, std):
    with pytest.raises(ValueError, match="mean and std must have same length"):
        VisionDataCollator(mean=mean, std=std)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_collator_refuses_std_when_not_positive(std):
    with pytest.raises(ConfigError, match="standard deviations above 0"):
        VisionDataCollator(mean=[0.5], std=[std])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("is_tensor", [True, False])
def test_collator_refuses_images_when_shapes_differ(normalize, is_tensor):
    pixels = [np.zeros((3, 4, 4), np.float32), np.zeros((3, 4, 5), np.float32)]
    pixels = [torch.from_numpy(p) for p in pixels] if is_tensor else pixels

    with pytest.raises(DataError, match="Inconsistent pixel_values shapes"):
        VisionDataCollator(normalize=normalize)(samples(pixels))


def test_collator_refuses_images_when_one_is_uint8():
    pixels = [np.zeros((3, 4, 4), np.float32), np.zeros((3, 4, 4), np.uint8)]

    with pytest.raises(DataError, match="Inconsistent pixel_values dtypes"):
        VisionDataCollator()(samples(pixels))


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (torch.zeros(1, 4, 4), 1),
        (torch.zeros(4, 4), 1),
        (np.zeros((8, 8), np.uint8), 1),
        (np.zeros((8, 8, 4), np.uint8), 4),
        (np.zeros((4, 8, 8), np.uint8), 4),
        (torch.zeros(8, 8, 3), 8),
        (torch.zeros(1, 4, 4, dtype=torch.bfloat16), 1),
    ],
)
def test_collator_refuses_images_when_channels_do_not_match(image, channels):
    message = rf"Number of channels \({channels}\) doesn't match mean length"

    with pytest.raises(ValueError, match=message):
        VisionDataCollator()(samples([image]))


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4, 4), np.int64), torch.zeros(3, 4, 4).bool(), np.full((3, 4, 4), None)]
)
def test_collator_refuses_pixels_when_neither_uint8_nor_float(image):
    with pytest.raises(DataError, match=r"uint8 in 0..255 or float in 0..1"):
        VisionDataCollator()(samples([image]))


@pytest.mark.parametrize("image", [np.zeros((2, 1, 4, 4), np.uint8), torch.zeros(16)])
def test_collator_refuses_images_when_rank_does_not_fit(image):
    with pytest.raises(DataError, match=r"image of shape .*expected \(channel, height, width\)"):
        VisionDataCollator(mean=[0.5], std=[0.5])(samples([image]))


@pytest.mark.parametrize("other", [torch.zeros(3, 4, 4), np.zeros((3, 4, 4), np.float32)])
def test_collator_refuses_images_when_one_is_bfloat16(other):
    with pytest.raises(DataError, match="Inconsistent pixel_values"):
        VisionDataCollator()(samples([torch.zeros(3, 4, 4).bfloat16(), other]))


def test_collator_refuses_palette_image():
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(np.zeros((4, 4), np.uint8)).convert("P")

    with pytest.raises(DataError, match="mode 'P'"):
        VisionDataCollator()(samples([image]))


def test_collator_refuses_value_when_not_an_image():
    with pytest.raises(DataError, match=r"samples\[0\]\['pixel_values'\]: got str"):
        VisionDataCollator()(samples(["cat.png"]))


def test_collator_refuses_batch_when_empty():
    with pytest.raises(ValueError, match="empty batch"):
        VisionDataCollator()([])


def test_collator_gives_labels_and_other_keys(rng):
    batch = VisionDataCollator()(
        samples(images(rng), labels=[2, 0, 1], age=[1.5, 2.5, 3.5], box=[np.arange(4)] * 3)
    )

    assert list(batch) == ["pixel_values", "labels", "age", "box"]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [2, 0, 1]
    assert batch["age"].tolist() == [1.5, 2.5, 3.5]
    assert batch["box"].shape == (3, 4)


def test_collator_survives_pickling(rng):
    collate = VisionDataCollator(mean=[0.5] * 3, std=[0.5] * 3)
    batch = samples(images(rng))
    expected = collate(batch)["pixel_values"]

    assert torch.equal(pickle.loads(pickle.dumps(collate))(batch)["pixel_values"], expected)


def test_hook_declines_task_when_not_vision():
    assert dovetail_collate(TaskSpec(modality="text"), Options()) is None


def test_hook_leaves_uint8_to_device_transform(rng):
    pixels = images(rng)
    collate = dovetail_collate(VISION, Options())

    batch = collate(samples(pixels, labels=[0, 1, 2]))
    result = collate.device_transform(batch["pixel_values"])

    assert isinstance(collate, Collator)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (3, 3, 5, 7)
    assert result.is_contiguous()
    torch.testing.assert_close(
        result, VisionDataCollator()(samples(pixels))["pixel_values"], **CLOSE
    )


def test_hook_passes_through_when_not_normalizing(rng):
    collate = dovetail_collate(VISION, Options(normalize=False))

    batch = collate(samples(images(rng)))

    assert collate.device_transform is None
    assert batch["pixel_values"].is_contiguous()


def test_hook_gives_float_labels_when_task_is_regression(rng):
    collate = dovetail_collate(TaskSpec(modality="vision", kind="regression"), Options())

    assert collate(samples(images(rng), labels=[1, 2, 3]))["labels"].dtype == torch.float32


@pytest.mark.parametrize("image", [torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4)])
def test_hook_refuses_images_when_channels_do_not_match(image):
    with pytest.raises(DataError, match=r"Number of channels \(1\)"):
        dovetail_collate(VISION, Options())(samples([image]))


def test_hook_refuses_statistics_when_task_has_other_channels():
    task = TaskSpec(
        modality="vision", inputs=(TensorSpec(name="pixel_values", shape=("batch", 1, 8, 8)),)
    )

    with pytest.raises(ConfigError, match=r"Set mean = \[0.5\] and std = \[0.5\]"):
        dovetail_collate(task, Options())
    assert dovetail_collate(task, Options(mean=(0.5,), std=(0.5,))) is not None


def test_options_refuse_mean_without_std():
    with pytest.raises(ValidationError, match="mean and std must have same length"):
        Options(mean=(0.5,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_transform_gives_float32(dtype):
    pixels = torch.rand(2, 3, 4, 5)
    pixels = (pixels * 255).to(dtype) if dtype == torch.uint8 else pixels.to(dtype)

    result = PixelNormalize(IMAGENET_MEAN, IMAGENET_STD)(pixels)

    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact(pixels.numpy()).float(), **CLOSE)


def test_transform_is_rebuilt_from_config():
    module = PixelNormalize((0.1, 0.2), (0.3, 0.4))
    again = type(module)(**json.loads(json.dumps(module.config)))
    pixels = torch.rand(2, 2, 3, 3)

    assert torch.equal(again(pixels), module(pixels))
    assert not module.state_dict()
    assert not list(module.parameters())


def test_transform_keeps_its_statistics_when_cast_with_the_model():
    module = PixelNormalize(IMAGENET_MEAN, IMAGENET_STD)
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = module(pixels)

    assert torch.equal(module.half()(pixels), expected)
    assert module.to("meta").mean.device.type == "meta"


def test_transform_leaves_float_pixels_unchanged():
    pixels = torch.rand(2, 3, 4, 4)
    copy = pixels.clone()

    PixelNormalize(IMAGENET_MEAN, IMAGENET_STD)(pixels)

    assert torch.equal(pixels, copy)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64)]
)
def test_transform_refuses_pixels_that_do_not_fit(pixels):
    with pytest.raises(DataError):
        PixelNormalize(IMAGENET_MEAN, IMAGENET_STD)(pixels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_transform_exports_with_any_batch_size(dtype):
    module = PixelNormalize(IMAGENET_MEAN, IMAGENET_STD).eval()
    example = torch.ones(2, 3, 4, 4).to(dtype)
    pixels = (torch.rand(5, 3, 4, 4) * 255).to(dtype)

    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))

    torch.testing.assert_close(program.module()(pixels), module(pixels), **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's own dependencies
@pytest.mark.filterwarnings("ignore::FutureWarning")  # likewise
@pytest.mark.filterwarnings("ignore::UserWarning")  # likewise
def test_transform_exports_to_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = PixelNormalize(IMAGENET_MEAN, IMAGENET_STD).eval()
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)

    torch.onnx.export(
        module,
        (pixels[:2],),
        tmp_path / "m.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})

    torch.testing.assert_close(torch.from_numpy(result), module(pixels), **CLOSE)
