"""The data of a config: its splits, its collator and its loaders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dovetail import Collator, ConfigError
from dovetail.errors import build_message
from dovetail.preflight import CheckedConfig, build_splits, check_collator
from dovetail.run.agreement import WorkerCheck
from dovetail.run.distributed import Ranks
from dovetail.run.loader import EpochLoader, Splits, build_loader, primary_input
from dovetail.run.naming import name_tuple


class ConfiguredData:
    """Splits and collator of a config.

    Args:
        checked: The config with its backends.
        data: Splits, in place of `[data] factory`. Without either, loaders come with the batches.

    Raises:
        ConfigError: The factory does not import or does not take its arguments, or the config
            names no collator for the task.
        DataError: What the factory returns is no split.
    """

    def __init__(self, checked: CheckedConfig, data: Any) -> None:
        self._checked = checked
        self.input_name = primary_input(checked.config.task)
        """What the primary input is called in a batch."""
        self.splits: Splits | None = None
        """`None` where the loaders are all handed to the Trainer."""
        if data is not None or checked.config.data.factory is not None:
            self.splits = build_splits(checked, data)
        has_samples = self.splits is not None and not self.splits.has_own_loaders
        self.collator = self._build_collator() if has_samples else None
        """`None` where the batches are the user's own."""
        module = getattr(self.collator, "device_transform", None)
        self.transform = module.eval() if isinstance(module, nn.Module) else None
        """What the collator has left to the device."""

    def require(self) -> Splits:
        """Return the splits.

        Raises:
            ConfigError: There are none.
        """
        if self.splits is None:
            hint = 'Write factory = "module:function", or pass data= to DovetailModule.from_config.'
            raise ConfigError(build_message("config data.factory", "nothing given", "", hint))
        return self.splits

    def name(self, batch: Any) -> dict[str, Tensor]:
        """Return the tensors of a batch by name, preprocessed.

        Raises:
            DataError: It is neither a mapping nor a tuple of one or two items.
        """
        named = dict(name_tuple(batch, self.input_name))
        if self.transform is not None:
            named[self.input_name] = self.transform(named[self.input_name])
        return named

    def build_loader(
        self, split: Any, device: torch.device, ranks: Ranks, *, is_training: bool
    ) -> EpochLoader:
        """Return the loader of a split, as `dovetail train` has it; all ranks call it together."""
        names = [] if self.collator is None else self._checked.options("collate")
        registry, lock = self._checked.registry, self._checked.lock()
        checks = [WorkerCheck.of(registry.load("collate", name).info, lock) for name in names]
        return build_loader(
            split,
            self._checked.config,
            self.collator,
            device,
            is_training=is_training,
            worker_check=next(iter(checks), None),
            ranks=ranks,
        )

    def _build_collator(self) -> Collator:
        checked = self._checked
        if checked.collator_error is not None:
            raise checked.collator_error
        ((name, options),) = checked.options("collate").items()
        collator = checked.registry.collate(name, checked.config.task, options)
        where = checked.registry.load("collate", name).info.where
        check_collator(collator, checked.config.data.num_workers, where)
        return collator
