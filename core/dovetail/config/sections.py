"""The sections of a run's config, each field with its help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticSerializationError, to_jsonable_python

from dovetail.config.options import ClosedModel
from dovetail.errors import ConfigError, build_message
from dovetail.task import TaskSpec

OFF = "off"
AUTO = "auto"

_SAFE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
FolderName: TypeAlias = Annotated[str, StringConstraints(pattern=_SAFE_NAME, max_length=100)]
"""A name that is a folder on every file system."""
ImportPath: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
]
"""`package.module:object`; a module beside the config file is found."""


class Section(ClosedModel):
    """Base of a section: no NaN or infinity."""

    model_config = ConfigDict(allow_inf_nan=False, ser_json_inf_nan="constants")


class RunConfig(Section):
    """The run as a whole."""

    name: FolderName = "run"
    """Name of the run; its folders lie under it."""
    dir: Path = Path("runs")
    """Folder that holds all runs, from the working directory."""
    id: FolderName | None = None
    """Folder of this run under `dir/name`; it must not exist. Without it: date and time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random generator."""
    deterministic: bool = False
    """Use deterministic kernels only; slower, and an error where there is none."""
    report: bool = True
    """Draw report.html and report.png at the end, where matplotlib is installed."""
    plugins: tuple[str, ...] = ()
    """Wrapper plugins around the hooks, the first outermost."""
    plugin_autoload: bool | None = None
    """Whether every installed distribution may offer plugins, as it may without this key; false
    leaves dovetail's own and those of `plugin_allow`. `DOVETAIL_PLUGIN_AUTOLOAD` overrules it."""
    plugin_allow: tuple[str, ...] | None = None
    """Distributions, or `distribution:name`, that may offer plugins beside dovetail's own; all
    others may not. `DOVETAIL_PLUGIN_ALLOW`, a list with commas, overrules it."""


class ModelConfig(Section):
    """The model to train."""

    factory: ImportPath | None = None
    """Function that returns the model."""
    kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the factory."""


class DataConfig(Section):
    """The data to train on."""

    factory: ImportPath | None = None
    """Function that returns the splits: a mapping or a pair of data sets or loaders."""
    kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the factory."""
    num_workers: NonNegativeInt = 0
    """Processes that load and collate; 0 does it in the training process."""
    shuffle: bool = True
    """Shuffle the training split, differently in every epoch, the same for the same seed."""


Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]


class TrainConfig(Section):
    """The loop."""

    epochs: PositiveInt = 1
    """Passes over the training split."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, even in the middle of an epoch."""
    batch_size: PositiveInt = 32
    """Samples per micro-batch and rank."""
    eval_batch_size: PositiveInt | None = None
    """Samples per batch of the evaluation; `batch_size` without it."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "sgd"] | ImportPath = "adamw"
    """Optimizer: "adamw", "sgd", or an import path of a `torch.optim.Optimizer` class."""
    optimizer_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, such as `momentum` or `betas`."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay; biases and normalisation weights (fewer than two dimensions) get none."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the optimizer steps in which the learning rate rises linearly from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of `lr`; not for the constant schedule."""
    precision: Precision = "fp32"
    """Number format of forward and backward; weights stay fp32."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """Device; "auto" takes CUDA where there is one, else the CPU."""
    loss: Literal["task", "model"] | ImportPath = "task"
    """"task" fits the task's kind; "model" takes the `loss` the model returns; an import path
    names a function `(outputs, batch) -> loss` or `-> (loss, items)` with a mean loss."""
    monitor: str = "val/loss"
    """Metric that decides which checkpoint is best."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger `monitor` is better."""
    patience: PositiveInt | None = None
    """Stop when `monitor` was no better for this many evaluations in a row."""
    checkpoint_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints inside an epoch; every epoch ends with one."""
    max_skipped_windows: PositiveInt = 10
    """Stop the run after this many windows in a row whose loss or gradient was not finite."""


class DistributedConfig(Section):
    """Training on several processes, which a launcher such as torchrun starts."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """"ddp" copies the model to every process, "fsdp" (FSDP2) divides parameters, gradients and
    optimizer state among them; "auto" is "ddp" where there are several processes."""
    data: Literal["split", "own"] | None = None
    """How a stream or a loader of your own is divided, which has no default: "split" lets every
    process read all of it and keep its turn of the batches, "own" takes what the data factory
    gives each process as its part. A data set with a length is always dealt out."""
    find_unused_parameters: bool = False
    """Allow parameters that a forward pass does not use, at some cost; for "ddp"."""
    param_dtype: Precision = "fp32"
    """Number format in which "fsdp" gathers parameters and computes with them; weights are kept,
    and gradients summed, in fp32."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state of "fsdp" in the memory of the host."""


class HookSection(Section):
    """Base of a hook's section: `use` names backends, a table of a backend's name its options."""

    options: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict, exclude=True)
    """Options by backend; written as tables `[section.<name>]`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_tables(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("options", {}), Mapping):
            return data
        known = set(cls.model_fields)
        tables = {k: v for k, v in data.items() if k not in known and isinstance(v, Mapping)}
        rest = {k: v for k, v in data.items() if k not in tables}
        return {**rest, "options": {**rest.get("options", {}), **tables}}

    @property
    def names(self) -> tuple[str, ...]:
        """Backends that are asked for by name."""
        use = getattr(self, "use", ())
        names = (use,) if isinstance(use, str) else tuple(use)
        return tuple(name for name in names if name not in (OFF, AUTO))


class CompileConfig(HookSection):
    """Compilation of the model."""

    use: str = OFF
    """Backend of the compile hook, or "off"."""


class CollateConfig(HookSection):
    """From samples to batches."""

    use: str = AUTO
    """Backend of the collate hook; "auto" finds the one for the task's modality."""


class AccumulateConfig(HookSection):
    """From micro-batches to optimizer steps."""

    use: str = "exact"
    """Backend of the accumulate hook."""


class _ManySection(HookSection):
    use: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _accept_one_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("use"), str):
            return {**data, "use": (data["use"],)}
        return data


class LogConfig(_ManySection):
    """Trackers that follow the metric log; the log itself is always written."""

    use: tuple[str, ...] = ()
    """Backends of the log hook."""
    follow: Literal["process", "thread"] = "process"
    """Where trackers are fed from: a process of their own, or threads of the training, whose
    interpreter they then share. A tracker that needs the training's process gets a thread."""
    flush_s: NonNegativeFloat = 30.0
    """Seconds that the trackers get at the end of the run, and after a crash; one that needs longer
    is parked, and `dovetail log sync` hands it the rest later."""
    calls_per_s: PositiveFloat | None = None
    """Calls per second that each tracker gets at most; no limit without it."""
    system_s: NonNegativeFloat = 5.0
    """Seconds between two records of system metrics; 0 for none."""
    graph: bool = False
    """Trace the model once and keep its graph as `graph.json`; TensorBoard shows it."""


class ExportConfig(_ManySection):
    """The bundle that is built after training."""

    use: tuple[str, ...] = ()
    """Backends of the export hook; none builds no bundle."""


class TrainingConfig(Section):
    """Everything that decides a run."""

    HOOK_SECTIONS: ClassVar[tuple[str, ...]] = ("compile", "collate", "accumulate", "log", "export")

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    task: TaskSpec = TaskSpec()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    compile: CompileConfig = CompileConfig()
    collate: CollateConfig = CollateConfig()
    accumulate: AccumulateConfig = AccumulateConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    def hook_section(self, hook: str) -> HookSection:
        """Return the section of a hook."""
        section: HookSection = getattr(self, hook)
        return section

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, backends' options as tables, without what is `None`.

        Raises:
            ConfigError: It holds an object that is no plain value.
        """
        try:
            plain: dict[str, Any] = self.model_dump(mode="json")
            for hook in self.HOOK_SECTIONS:
                plain[hook].update(to_jsonable_python(self.hook_section(hook).options))
        except PydanticSerializationError as err:
            expected = "numbers, strings, lists and tables"
            hint = "Hand over objects as arguments of dovetail.train, not in the config."
            raise ConfigError(build_message("config", str(err), expected, hint)) from err
        cleaned: dict[str, Any] = _without_none(plain)
        return cleaned

    def to_flat_dict(self) -> dict[str, Any]:
        """Return `to_dict` with dotted names, for trackers."""
        return dict(_flatten(self.to_dict()))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", item))
    return rows
