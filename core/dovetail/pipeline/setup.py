"""What a run is made of before it begins, made by each rank for itself and alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dovetail.preflight import (
    CheckedConfig,
    build_model,
    build_recipe,
    build_splits,
    check_collator,
)
from dovetail.run.agreement import WorkerCheck
from dovetail.run.checkpoint import seed_everything
from dovetail.run.distributed import Ranks
from dovetail.run.flops import FlopMeter
from dovetail.run.launch import check_strategy, choose_rank_device
from dovetail.run.loader import EpochLoader, build_loader, mix_seed, primary_input
from dovetail.run.naming import Batch
from dovetail.run.samples import take_batches
from dovetail.types import Collator


class Setup:
    """Device, model, data and exporters of a run.

    Args:
        checked: The config with its backends.
        model: A model in place of the config's factory.
        data: Splits in place of the config's factory.
        ranks: Who does the job together.

    Raises:
        DovetailError: Something in the config, the model or the data does not fit.
    """

    def __init__(
        self, checked: CheckedConfig, model: nn.Module | None, data: Any, ranks: Ranks
    ) -> None:
        self.checked = checked
        self.config = checked.config
        self.registry = checked.registry
        self.ranks = ranks
        self.lock = checked.lock()
        check_strategy(self.config, ranks)
        self.device = choose_rank_device(self.config.train.device, ranks)
        self.recipe = None if model is not None else build_recipe(checked)
        seed = self.config.run.seed
        seed_everything(seed)
        if self.config.run.deterministic:  # never off: it may be the caller's own wish
            torch.use_deterministic_algorithms(True)
        self.model = build_model(checked, model).to(self.device)
        self.splits = build_splits(checked, data)
        self.collator = None if self.splits.has_own_loaders else self._build_collator()
        self.transform = self._find_transform()
        """Input name and the preprocessing that runs on the device."""
        self.meter = FlopMeter()
        self.exporters = {
            name: self.registry.export(name, self.config.task, options)
            for name, options in checked.options("export").items()
        }
        if ranks.rank:  # what is drawn from now on differs: dropout, augmentation
            seed_everything(mix_seed(seed, ranks.rank))

    def build_loader(self, split: Any, *, is_training: bool) -> EpochLoader:
        """Return the loader of a split."""
        names = [] if self.collator is None else self.checked.options("collate")
        checks = [WorkerCheck.of(self.registry.load("collate", n).info, self.lock) for n in names]
        return build_loader(
            split,
            self.config,
            self.collator,
            self.device,
            is_training=is_training,
            worker_check=next(iter(checks), None),
            ranks=self.ranks,
        )

    def take_batches(self, split: Any, sizes: Sequence[int]) -> list[Batch]:
        """Return batches of real samples in the sizes asked for, on the CPU."""
        return take_batches(split, self.collator, primary_input(self.config.task), sizes)

    def _build_collator(self) -> Collator:
        if self.checked.collator_error is not None:
            raise self.checked.collator_error
        ((name, options),) = self.checked.options("collate").items()
        collator = self.registry.collate(name, self.config.task, options)
        where = self.registry.load("collate", name).info.where
        check_collator(collator, self.config.data.num_workers, where)
        return collator

    def _find_transform(self) -> tuple[str, nn.Module] | None:
        module = getattr(self.collator, "device_transform", None)
        if not isinstance(module, nn.Module):
            return None
        return primary_input(self.config.task), module.to(self.device).eval()
