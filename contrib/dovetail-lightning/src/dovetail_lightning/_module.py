"""`DovetailModule`: everything of a config but the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dovetail import TrainingConfig, WindowResult
from dovetail.errors import ConfigError, build_message
from dovetail.preflight import (
    CheckedConfig,
    ConfigSource,
    build_model,
    check_config,
    check_monitor,
    try_one_batch,
)
from dovetail.run.checkpoint import random_state, seed_everything, set_random_state
from dovetail.run.distributed import ALONE, join_ranks
from dovetail.run.flops import FlopMeter
from dovetail.run.loader import EpochLoader, Splits, mix_seed
from dovetail.run.losses import build_objective, check_additive
from dovetail.run.schedule import build_factor, build_optimizer
from dovetail.run.shards import Filler
from dovetail.run.skips import SkipWatch
from dovetail.run.tracking.recording import muted
from dovetail.signature import build_call, primary_output
from dovetail_lightning._data import ConfiguredData
from dovetail_lightning._evaluation import EvaluationSums
from dovetail_lightning._export import export_bundle
from dovetail_lightning._loaders import SplitLoader, TrainingLoader
from dovetail_lightning._settings import (
    build_trainer_options,
    check_config_for_lightning,
    check_trainer,
    read_accumulation,
    warn_of_ignored,
)
from dovetail_lightning._window import Window

if TYPE_CHECKING:
    from dovetail.bundle import BundleReport
    from dovetail.registry import Registry

_STATE = "dovetail"


class DovetailModule(pl.LightningModule):
    """Model, data, loss, optimizer, schedule and metrics of a config, for Lightning's Trainer.

    Its steps are those of `dovetail train` with the same config: the gradient of a window is that
    of the one large batch, over micro-batches of any lengths, the tail of an epoch and all ranks.
    A window whose loss or gradient is not finite changes no weight.

    Args:
        checked: The config with its backends; see `from_config`.
        model: A model, in place of `[model] factory`.
        data: Splits, in place of `[data] factory`.

    Raises:
        ConfigError: Something in the config does not fit, or is nothing that a Trainer does.
        DataError: What the data factory returns is no split.
    """

    def __init__(
        self, checked: CheckedConfig, model: nn.Module | None = None, data: Any = None
    ) -> None:
        super().__init__()
        self.checked = checked
        self.config: TrainingConfig = checked.config
        self._accumulation = read_accumulation(checked)
        check_config_for_lightning(self.config)
        train = self.config.train
        seed_everything(self.config.run.seed)
        self.model = build_model(checked, model)
        # In it, and in no submodule, is what the collator leaves to the device: it has a mode of
        # its own, and is no part of what is trained or saved.
        self._data = ConfiguredData(checked, data)
        self._objective = build_objective(self.config.task, train.loss, checked.directory)
        self._random_state = random_state()
        self._ranks = ALONE
        self._window = Window(ALONE)
        self._skips = SkipWatch(train.max_skipped_windows)
        self._evaluation = self._begin_evaluation()
        self._train_loader: EpochLoader | None = None
        self._read: TrainingLoader | None = None
        self._data_state: dict[str, int] = {}
        self._window_state: dict[str, Any] = {}
        self._call: Callable[[Any], Any] | None = None
        self._is_compiled = self._is_resumed = False
        self.meter = FlopMeter()
        """What a forward pass costs, where that could be counted."""
        self.num_steps = 0
        """Optimizer steps that were taken; one that was skipped is none."""
        self.last_window: WindowResult | None = None
        """The window that the last micro-batch has closed; `None` while one is open."""
        self.last_evaluation: dict[str, float] = {}
        """Metrics of the last evaluation: means over all items, those of all ranks."""

    @classmethod
    def from_config(
        cls,
        config: ConfigSource,
        overrides: Sequence[str] = (),
        *,
        model: nn.Module | None = None,
        data: Any = None,
        registry: Registry | None = None,
    ) -> DovetailModule:
        """Build the module of a config, the file that `dovetail train` takes.

        Python's, NumPy's and torch's generators are seeded with `run.seed`.

        Args:
            config: A TOML or JSON file, plain tables, or a `TrainingConfig`.
            overrides: Settings such as `train.lr=3e-4`, applied on top.
            model: A model, in place of `[model] factory`.
            data: Splits, in place of `[data] factory`, as for `dovetail.train`.
            registry: Where backends come from; the process's own without it.

        Raises:
            ConfigError: Something in the config does not fit, or is nothing that a Trainer does.
            PluginError: A backend is broken.
            DataError: What the data factory returns is no split.
        """
        return cls(check_config(config, overrides, registry=registry), model, data)

    def trainer_options(self, **changes: Any) -> dict[str, Any]:
        """Return arguments for a Trainer: what the config says, in Lightning's words.

        Args:
            changes: Further arguments, or other ones: `devices=2, strategy="ddp"`.

        Raises:
            ConfigError: Lightning has no accelerator for `train.device`.
        """
        options = build_trainer_options(self.config, self._accumulation) | changes
        if options.get("strategy") == "ddp" and self.config.distributed.find_unused_parameters:
            options["strategy"] = "ddp_find_unused_parameters_true"
        return options

    def export(self, directory: str | Path) -> BundleReport:
        """Export the model as `[export]` says, into a bundle that proves itself.

        Call it on one process, after `trainer.fit`, with the weights loaded that are meant.

        Args:
            directory: The bundle's folder; it must not exist.

        Raises:
            ConfigError: There are no data to prove the bundle with.
            ExportError: No format could be exported.
        """
        return export_bundle(self.checked, self.model, self._data, Path(directory))

    # What Lightning calls, in its order

    def configure_callbacks(self) -> list[Callback]:
        """Stop early as `train.patience` says."""
        train = self.config.train
        if train.patience is None:
            return []
        return [EarlyStopping(train.monitor, patience=train.patience, mode=train.monitor_mode)]

    def setup(self, stage: str) -> None:
        """Hold the Trainer against the config, run one batch through everything, and compile.

        Raises:
            ConfigError: The two contradict each other, or `train.monitor` names no metric.
            DataError: There is no batch, or its labels do not fit.
            ModelError: The model does not take the batch, or its output does not fit the loss.
        """
        self._ranks = join_ranks()
        self._window = Window(self._ranks)
        with self._ranks.together():
            if stage == "fit":
                check_trainer(self.trainer, self.config, self._accumulation)
                check_additive(self._objective, self.trainer.accumulate_grad_batches)
                if self._ranks.is_first:
                    warn_of_ignored(self.trainer, self.config)
            device = self.trainer.strategy.root_device
            self.model.to(device)
            if self._data.transform is not None:
                self._data.transform.to(device)
        if stage == "fit" and self._data.splits is not None:
            self._train_loader = self._build_train_loader()
            self._try_one_batch(self._train_loader, self._data.splits)
        if not self._is_compiled:
            self._is_compiled = True
            for name, options in self.checked.options("compile").items():
                task = self.config.task
                self.model = self.checked.registry.compile(name, self.model, task, options)

    def train_dataloader(self) -> TrainingLoader:
        """Return the training split, as `dovetail train` reads it.

        Raises:
            ConfigError: There are no data.
        """
        loader = self._train_loader or self._build_train_loader()
        self._read = TrainingLoader(loader, self._ranks)
        if self._data_state:
            # Lightning would do it itself, were the loader not asked for its length before.
            self._read.load_state_dict(self._data_state)
        return self._read

    def val_dataloader(self) -> SplitLoader | list[Any]:
        """Return the validation split; nothing where there is none."""
        split = None if self._data.splits is None else self._data.splits.validation
        if split is None:
            return []
        device = self.trainer.strategy.root_device
        loader = self._data.build_loader(split, device, self._ranks, is_training=False)
        return SplitLoader(loader, self._ranks)

    def configure_optimizers(self) -> Any:
        """Return the config's optimizer, and its schedule over the steps that the Trainer takes.

        Raises:
            ConfigError: The optimizer does not take its arguments, or the schedule needs to know
                the number of steps, and nobody does.
        """
        train = self.config.train
        optimizer = build_optimizer(self.model, train, self.checked.directory)
        total = self.trainer.estimated_stepping_batches
        has_end = 0 < total < float("inf")
        if not has_end and (train.schedule != "constant" or train.warmup_ratio):
            found = f"{train.schedule!r} needs the number of steps; the data have none"
            hint = 'Set train.max_steps, or train.schedule = "constant" without warm-up.'
            raise ConfigError(build_message("config train.schedule", found, action=hint))
        factor = build_factor(train, int(total) if has_end else 1)
        # By our own count, in which a skipped step is none.
        schedule = LambdaLR(optimizer, lambda _: factor(self.num_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"},
        }

    def on_train_start(self) -> None:
        """Put the random generators where `dovetail train` has them, and open an old window."""
        state, self._window_state = self._window_state, {}
        self._window.load_state_dict(state, self.trainer.optimizers[0])
        rank = self._ranks.rank
        if rank:  # what is drawn from now on differs: dropout, augmentation
            seeds = (rank, self.num_steps) if self._is_resumed else (rank,)
            seed_everything(mix_seed(self.config.run.seed, *seeds))
        else:
            set_random_state(self._random_state)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return what Lightning shall back-propagate as "loss", and the batch's "items"."""
        self.last_window = None
        named = self._data.name(batch)
        is_filler = type(batch) is Filler
        with muted() if is_filler else nullcontext():
            loss, items = self._objective.loss(self(named), named)
        items = 0 if is_filler else items
        return {"loss": self._window.add(loss, items), "items": items}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the one large batch, and clip them."""
        trainer = self.trainer
        norm = None if trainer.gradient_clip_val is not None else self._accumulation.max_grad_norm
        window = self._window.close(optimizer, trainer.accumulate_grad_batches, norm)
        self.last_window = window
        if window.is_skipped or not window.items:
            return
        self.num_steps += 1
        self.log("train/loss", window.loss, prog_bar=True, on_step=True, on_epoch=False)
        if window.grad_norm is not None:
            self.log("train/grad_norm", window.grad_norm, on_step=True, on_epoch=False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count windows that were skipped.

        Raises:
            NonFiniteLossError: There were too many in a row.
        """
        window = self.last_window
        if window is not None and window.is_skipped:
            self._skips.note(window, self.num_steps)
        elif window is not None:
            self._skips.reset()

    def on_validation_epoch_start(self) -> None:
        """Begin to sum."""
        self._evaluation = self._begin_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Add a batch to the sums; return its "items" and the "names" of the metrics."""
        named = self._data.name(batch)
        is_filler = type(batch) is Filler
        with muted() if is_filler else nullcontext():
            outputs = self(named)
            loss, items = self._objective.loss(outputs, named)
            means = {"loss": loss, **self._objective.metrics(outputs, named)}
        if is_filler:
            self._evaluation.add_nothing(means)
            return {"items": 0, "names": []}
        return {"items": items, "names": self._evaluation.add(means, items)}

    def on_validation_epoch_end(self) -> None:
        """Log the means over all items of the split."""
        values = self._evaluation.close()
        self.last_evaluation = {f"val/{name}": value for name, value in values.items()}
        is_shared = self._ranks.size > 1  # alike on all ranks; Lightning asks for it none the less
        self.log_dict(self.last_evaluation, sync_dist=is_shared, batch_size=1)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the output that the loss is computed from, such as logits."""
        return primary_output(self(self._data.name(batch)))

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Call the model with a batch.

        Args:
            batch: Tensors by name, preprocessed.
        """
        if self._call is None:
            needs_labels = self._objective.needs_labels_in_model
            self._call = build_call(self.model, list(batch), needs_labels=needs_labels)
        return self._call(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of steps, the open window, and where data and random generators are."""
        optimizers = self.trainer.optimizers
        checkpoint[_STATE] = {
            "num_steps": self.num_steps,
            "data": {} if self._read is None else self._read.state_dict(),
            "random": random_state(),
            "window": self._window.state_dict(optimizers[0]) if optimizers else {},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        state = checkpoint[_STATE]
        self.num_steps, self._data_state = state["num_steps"], state["data"]
        self._random_state, self._window_state = state["random"], state["window"]
        self._is_resumed = True

    def _begin_evaluation(self) -> EvaluationSums:
        return EvaluationSums(self._ranks, has_perplexity=self._objective.has_perplexity)

    def _build_train_loader(self) -> EpochLoader:
        device, split = self.trainer.strategy.root_device, self._data.require().train
        return self._data.build_loader(split, device, self._ranks, is_training=True)

    def _try_one_batch(self, loader: EpochLoader, splits: Splits) -> None:
        data, config = self._data, self.config
        transform = None if data.transform is None else (data.input_name, data.transform)
        meter = self.meter if config.log.system_s else None
        with self._ranks.together():
            names = try_one_batch(
                self.model, loader, config.task, self._objective, transform, meter
            )
            check_monitor(config.train, names, has_validation=splits.validation is not None)
