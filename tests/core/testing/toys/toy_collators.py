"""A right collator, and collators that each break one thing. A worker process imports them."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from dovetail import hookimpl
from dovetail.errors import DataError


class Plugin:
    """Offers a collator that it is given."""

    def __init__(self, make) -> None:
        self.make = make

    @hookimpl
    def dovetail_collate(self, task):
        return self.make()


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.config = {"by": by}
        self.by = by

    def forward(self, features: Tensor) -> Tensor:
        return features * self.by


class Padding:
    """Pads tokens on the right and stacks everything else."""

    def __init__(self, **attributes) -> None:
        self.device_transform = Scale(0.5)
        vars(self).update(attributes)

    def __call__(self, samples: list[Mapping]) -> dict[str, Tensor]:
        self.check(samples)
        batch = {key: self.stack(key, [s[key] for s in samples]) for key in samples[0]}
        return self.finish(batch, samples)

    def check(self, samples):
        if not samples:
            raise DataError("got an empty batch")
        if any(set(sample) != set(samples[0]) for sample in samples):
            raise DataError("samples disagree in their keys")

    def stack(self, key, values):
        if key == "tokens":
            width = max(map(len, values))
            return torch.tensor([value + [0] * (width - len(value)) for value in values])
        return torch.stack([torch.as_tensor(value) for value in values])

    def finish(self, batch, samples):
        return batch


class PaddingOnTheLeft(Padding):
    def stack(self, key, values):
        if key == "tokens":
            values = [value[::-1] for value in values]
        stacked = super().stack(key, values)
        return stacked.flip(1) if key == "tokens" else stacked


class Masking(Padding):
    """Draws which tokens to hide."""

    def finish(self, batch, samples):
        tokens = batch["tokens"]
        return {**batch, "tokens": tokens.where(torch.rand(tokens.shape) < 0.5, -1)}


class GivesList(Padding):
    def finish(self, batch, samples):
        return list(batch.values())


class GivesPlainLabels(Padding):
    def finish(self, batch, samples):
        return {**batch, "labels": batch["labels"].tolist()}


class Averages(Padding):
    def finish(self, batch, samples):
        return {**batch, "mean": batch["features"].mean(0)}


class CountsSamples(Padding):
    def finish(self, batch, samples):
        return {**batch, "count": torch.tensor(len(samples))}


class Squeezes(Padding):
    def finish(self, batch, samples):
        return {key: value.squeeze(0) for key, value in batch.items()}


class DropsWeight(Padding):
    def finish(self, batch, samples):
        return {key: value for key, value in batch.items() if key != "weight"}


class DropsUnknown(Padding):
    def finish(self, batch, samples):
        known = ("features", "tokens", "weight", "labels")
        return {key: value for key, value in batch.items() if key in known}


class Sorts(Padding):
    def finish(self, batch, samples):
        order = torch.tensor([len(sample["tokens"]) for sample in samples]).argsort(descending=True)
        return {key: value[order] for key, value in batch.items()}


class Reverses(Padding):
    def finish(self, batch, samples):
        return {key: value.flip(0) for key, value in batch.items()}


class NormalizesOverBatch(Padding):
    def finish(self, batch, samples):
        features = batch["features"]
        return {**batch, "features": features - features.mean()}


class GuessesDtype(Padding):
    def finish(self, batch, samples):
        weight = batch["weight"]
        is_whole = bool((weight == weight.round()).all())
        return {**batch, "weight": weight.long() if is_whole else weight}


class GivesFloat64(Padding):
    def finish(self, batch, samples):
        return {**batch, "weight": batch["weight"].double()}


class GivesFloatLabels(Padding):
    def finish(self, batch, samples):
        return {**batch, "labels": batch["labels"].float()}


class GivesInt32Labels(Padding):
    def finish(self, batch, samples):
        return {**batch, "labels": batch["labels"].int()}


class TruncatesLabels(Padding):
    def finish(self, batch, samples):
        return {**batch, "labels": batch["labels"].long()}


class AddsNoise(Padding):
    def finish(self, batch, samples):
        return {**batch, "features": batch["features"] + torch.rand(3)}


class Counts(Padding):
    calls = 0

    def finish(self, batch, samples):
        self.calls += 1
        return {**batch, "features": batch["features"] + self.calls}


class DrawsFromTheSystem(Padding):
    def finish(self, batch, samples):
        draw = random.Random(os.urandom(8)).random()
        return {**batch, "features": batch["features"] + draw}


class ChangesSamples(Padding):
    def finish(self, batch, samples):
        for sample in samples:
            sample["tokens"].append(0)
        return batch


class ReusesMemory(Padding):
    def __init__(self) -> None:
        super().__init__()
        self.buffers = {}

    def finish(self, batch, samples):
        for key, value in batch.items():
            buffer = self.buffers.setdefault((key, value.shape), torch.empty_like(value))
            batch[key] = buffer.copy_(value)
        return batch


class DiffersInWorker(Padding):
    def finish(self, batch, samples):
        return {**batch, "features": batch["features"] + (get_worker_info() is not None)}


class IndexesEmpty(Padding):
    def check(self, samples):
        if samples:
            super().check(samples)


class KeepsCommonKeys(Padding):
    def __call__(self, samples):
        if samples:
            common = set.intersection(*(set(sample) for sample in samples))
            samples = [{k: v for k, v in sample.items() if k in common} for sample in samples]
        return super().__call__(samples)


class LacksKeys(Padding):
    def check(self, samples):
        if not samples:
            raise DataError("got an empty batch")


class Trained(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.config = {"by": by}
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.by


class Forgetful(Scale):
    @property
    def config(self):
        return {"by": 1.0}

    @config.setter
    def config(self, value):
        pass


class Unwritable(Scale):
    @property
    def config(self):
        return {"by": torch.tensor(0.5)}

    @config.setter
    def config(self, value):
        pass


class Infinite(Scale):
    def forward(self, features: Tensor) -> Tensor:
        return features / 0


class Centers(Scale):
    def forward(self, features: Tensor) -> Tensor:
        return features - features.mean()
