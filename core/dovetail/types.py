"""The parts that hooks return and the values that cross hooks.

A hook is called once per run and returns a *part*; the loop calls the part directly. The
protocols here are all that the loop and the bundle ask of a part. Heavy types are imported for
type checkers only, so that importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from dovetail.task import TensorSpec

    Array: TypeAlias = npt.NDArray[np.generic]

Sample: TypeAlias = Mapping[str, Any]
"""One sample of a data set: names to arrays, tensors or numbers."""

Capability: TypeAlias = Literal["params", "figures", "artifacts", "texts", "histograms", "graphs"]
"""What a tracker can hold besides scalars."""


@runtime_checkable
class Collator(Protocol):
    """Turns samples into one batch. Picklable: it travels to the loader's workers.

    Optional attributes:

    - `device_transform`: an `nn.Module`, the tensor half of preprocessing (uint8 to normalised
      float, say). The loop runs it on the device as the first layer, and the same module is the
      first layer of every exported artifact. It takes and returns the tensor of the task's first
      input, and carries `config`, a JSON-able mapping with which `type(m)(**m.config)` is `m`.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate `samples` in their order; every key of the samples is kept.

        Raises:
            DataError: `samples` is empty, or their keys or shapes disagree.
        """
        ...


@dataclass(frozen=True)
class AccumulationStats:
    """What an accumulator has done so far."""

    total_steps: int
    """Micro-batches seen."""
    optimizer_steps: int
    """Optimizer steps taken; a skipped step counts nowhere."""
    current_accumulation: int
    """Micro-batches in the open window."""
    effective_batch_size: int
    """Samples per optimizer step: micro-batch size times accumulation steps."""
    is_accumulating: bool
    """Whether a window is open."""
    last_grad_norm: float | None
    """Norm of the last step's gradient before clipping; `None` before the first step."""

    def __str__(self) -> str:
        norm = "none yet" if self.last_grad_norm is None else f"{self.last_grad_norm:.4g}"
        return (
            f"{self.optimizer_steps} optimizer steps from {self.total_steps} micro-batches "
            f"({self.current_accumulation} in the open window), "
            f"effective batch size {self.effective_batch_size}, gradient norm {norm}"
        )


@dataclass(frozen=True)
class WindowResult:
    """What became of the last closed window."""

    loss: float
    """Mean loss over the window's items, those of all ranks."""
    items: float
    """Items in the window, of all ranks."""
    grad_norm: float | None
    """Norm of its gradient before clipping, where it was computed."""
    num_micro_batches: int
    is_skipped: bool
    """Whether loss or gradient were not finite, so that no step was taken."""


@runtime_checkable
class Accumulator(Protocol):
    """Owns backward, clipping, the optimizer step and zeroing the gradients.

    The gradient of a step is that of `sum(n_i * l_i) / sum(n_i)` over the micro-batches `i` of
    the window and all ranks, where `l_i` is a mean over `n_i` items.

    Optional members, for windows that are not all of one length:

    - `count_steps(num_batches: int, num_epochs: int) -> int | None` returns the optimizer steps of
      so many epochs of so many micro-batches; `None` where the data decide.
    - `max_accumulation_steps: int | None`, the micro-batches of the longest window; `None` where
      the data decide.
    """

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in a full window."""
        ...

    @property
    def effective_step(self) -> int:
        """Optimizer steps taken."""
        ...

    @property
    def is_window_open(self) -> bool:
        """Whether micro-batches are waiting for their optimizer step."""
        ...

    @property
    def stats(self) -> AccumulationStats:
        """Counts and the last gradient norm."""
        ...

    @property
    def last_window(self) -> WindowResult | None:
        """What became of the last closed window; `None` before the first one closed."""
        ...

    def micro_batch(self, is_final_batch: bool = False) -> AbstractContextManager[Any]:
        """Return the context for one micro-batch's forward and backward.

        Gradient synchronisation between ranks is off in it, unless the window ends here.
        """
        ...

    def accumulate(
        self, loss: Tensor, model: nn.Module, weight: Any = 1, is_final_batch: bool = False
    ) -> bool:
        """Back-propagate the mean `loss`, a scalar, of `weight` items.

        Args:
            loss: Mean loss of this micro-batch, shape `()`.
            model: Owner of the parameters.
            weight: Items the mean runs over: a number or a scalar tensor on the loss's device.
            is_final_batch: End the window here, however few its micro-batches are.

        Returns:
            Whether the optimizer took a step.
        """
        ...

    def flush(self, model: nn.Module) -> bool:
        """End an open window; return whether the optimizer took a step."""
        ...

    def reset_epoch(self) -> None:
        """Drop an open window, with its gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the open window, as tensors and numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Holds the metrics of a run somewhere else. Fed from the metric log, never from the loop.

    Whatever it raises costs the loop nothing: it is retried, then parked with one warning.

    Optional members:

    - `rewind(step: int)` drops everything after optimizer step `step`, all of it for -1. It is
      called before anything else when a run is resumed, or when a crash leaves open what was
      taken; the tracker is then fed again from there on.
    - `is_idempotent`: `True` says that a record which is given again, with the same step and
      values, is known and not stored twice, also by a new tracker of the same run. After a crash
      such a tracker is fed again from the beginning, instead of from where it had come to.
    - `log_many(rows: Sequence[tuple[int, Mapping[str, float]]])` records several steps with their
      metrics in one call, for a store that takes batches; called in place of `log`.
    - `log_text(name: str, text: str, step: int)`, with the capability "texts".
    - `log_histogram(name: str, counts: Sequence[float], edges: Sequence[float], step: int)`, with
      the capability "histograms": `counts[i]` values lie between `edges[i]` and `edges[i + 1]`.
    - `log_graph(path: Path)`, with the capability "graphs": the model as a JSON object whose
      `nodes` have `name` (with "/" under that of their module), `op`, `inputs`, which are names,
      and mostly `shape` and `dtype`.
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can hold besides scalars."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` at optimizer step `step`; calls come in the order of the log."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the run's settings, dotted names to plain values."""
        ...

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Record a picture, a PNG file."""
        ...

    def log_artifact(self, name: str, path: Path) -> None:
        """Record a file or a folder."""
        ...

    def close(self, status: str) -> None:
        """Finish; `status` is "completed", "interrupted" or "failed"."""
        ...


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know of the run it follows."""

    name: str
    id: str
    directory: Path
    """The run's folder; a tracker writes into a folder of its own in it."""
    params: Mapping[str, Any]
    """The resolved config, dotted names to plain values."""


@dataclass(frozen=True)
class Recipe:
    """How a module is built again in another process: an import path and its arguments."""

    factory: str
    """`package.module:function`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source_dir: Path | None = None
    """Folder the module was imported from; `None` for an installed package."""


@dataclass(frozen=True)
class ExportInputs:
    """An example batch and the signature it stands for."""

    tensors: Mapping[str, Tensor]
    """Example batch by input name, in the order of `specs`; at least two samples."""
    specs: tuple[TensorSpec, ...]
    """Name, dtype and shape of each input; a name in a shape is a dimension that varies."""
    output_names: tuple[str, ...]
    recipe: Recipe | None = None
    """How the trained model is rebuilt, where it came from an import path."""


@dataclass(frozen=True)
class Artifact:
    """One exported format: a main file and what lies beside it."""

    format: str
    path: Path
    """The file a runtime opens."""
    files: tuple[Path, ...]
    """Every file of the artifact, `path` among them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts: opset, precision."""


class Runner(Protocol):
    """An artifact, loaded in its own runtime."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name for `inputs` by name."""
        ...


@runtime_checkable
class Exporter(Protocol):
    """Writes one format and knows how to run it.

    Optional method: `runtime_source() -> str`, Python source that defines `load(path)` for the
    model card of a bundle and needs nothing but `requirements`.
    """

    @property
    def requirements(self) -> tuple[str, ...]:
        """What the artifact's own runtime needs, as requirement strings with floors."""
        ...

    @property
    def carries_code(self) -> bool:
        """Whether opening the artifact can execute code that lies in it."""
        ...

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Write the artifact into `directory`.

        Args:
            model: In eval mode on the CPU. `model(*tensors)` takes the tensors in the order of
                `inputs.specs` and returns a tuple of tensors named `inputs.output_names`. Its
                submodule `model` is the trained model, `transform` the collator's
                `device_transform` (or `nn.Identity`). The exporter must not change it.
            inputs: Example batch and signature.
            directory: An existing folder to write into.

        Raises:
            ExportError: The model cannot be expressed in this format.
        """
        ...

    def load(self, path: Path) -> Runner:
        """Load the artifact's main file in its own runtime."""
        ...
