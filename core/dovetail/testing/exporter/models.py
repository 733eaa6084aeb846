"""Small models with everything that exports trip over, and batches for them.

A `Subject` is what an exporter is checked with: a model that another process can build, its task,
and a way to draw batches of any size and length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dovetail.imports import import_object
from dovetail.task import TaskSpec
from dovetail.types import Recipe

_NUM_TOKENS = 20
_WIDTH = 8


@dataclass(frozen=True)
class Subject:
    """A model, and what it is fed with."""

    name: str
    task: TaskSpec
    recipe: Recipe
    """How the model is built, also in another process."""
    draw: Callable[[int, int, bool], dict[str, Tensor]]
    """Draws a batch of a size and a length, in which samples are padded or not; a model without
    lengths takes the size alone. Equal arguments draw equal batches."""
    transform: nn.Module | None = None
    """The collator's `device_transform`, applied to the first input."""

    def build_model(self) -> nn.Module:
        """Build the model, the same weights each time."""
        factory = import_object(self.recipe.factory, where=f"subject {self.name!r} factory")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = factory(**self.recipe.kwargs)
        return model

    @property
    def has_mask(self) -> bool:
        """Whether samples can be padded."""
        return "attention_mask" in self.draw(2, 2, False)


def vision_subject() -> Subject:
    """Return an image classifier: pixels of 8 bits, a convolution, a batch norm."""
    return Subject(
        name="vision",
        task=TaskSpec(name="conformance", modality="vision", num_classes=5),
        recipe=Recipe(f"{__name__}:build_vision_model"),
        draw=_draw_pixels,
        transform=PixelScale(255.0),
    )


def text_subject() -> Subject:
    """Return a text classifier: tokens and a mask, attention, a length that varies."""
    return Subject(
        name="text",
        task=TaskSpec(name="conformance", modality="text", num_classes=3),
        recipe=Recipe(f"{__name__}:build_text_model"),
        draw=_draw_tokens,
    )


SUBJECTS = {"vision": vision_subject, "text": text_subject}


class PixelScale(nn.Module):
    """Scales pixels of 8 bits to -1 to 1.

    Args:
        by: The largest value of a pixel.
    """

    def __init__(self, by: float) -> None:
        super().__init__()
        self.config = {"by": by}
        self._by = by

    def forward(self, pixels: Tensor) -> Tensor:
        """Return floats of the same shape."""
        return pixels.float() / self._by * 2 - 1


class VisionModel(nn.Module):
    """Classifies images of `(batch, 3, 8, 8)`; eval mode differs from training mode twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits of `(batch, 5)`."""
        x = torch.relu(self.norm(self.conv(pixel_values)))
        x = nn.functional.max_pool2d(x, 2)
        logits: Tensor = self.head(self.drop(x.flatten(1)))
        return logits


class TextModel(nn.Module):
    """Classifies texts of `(batch, sequence)`; padding must change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_NUM_TOKENS, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return logits of `(batch, 3)` and the tokens of each text, `(batch,)`."""
        x = self.embed(input_ids)
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / _WIDTH**0.5
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        x = x + self.drop(scores.softmax(-1) @ value)
        lengths = attention_mask.sum(1)
        pooled = (x * attention_mask[:, :, None]).sum(1) / lengths[:, None]
        return {"logits": self.head(pooled), "num_tokens": lengths}


def build_vision_model() -> VisionModel:
    """Build an image classifier whose batch norm has seen images."""
    model = VisionModel()
    nn.init.normal_(model.norm.get_buffer("running_mean"), std=0.3)
    nn.init.uniform_(model.norm.get_buffer("running_var"), 0.5, 2.0)
    return model


def build_text_model() -> TextModel:
    """Build a text classifier."""
    return TextModel()


def _draw_pixels(size: int, length: int, is_padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    shape = (size, 3, 8, 8)
    return {"pixel_values": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}


def _draw_tokens(size: int, length: int, is_padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size + 100 * length)
    ids = torch.randint(0, _NUM_TOKENS, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    if is_padded:
        for index in range(0, size, 2):
            mask[index, length - 1 - index % (length - 1) :] = 0
    return {"input_ids": ids, "attention_mask": mask}
