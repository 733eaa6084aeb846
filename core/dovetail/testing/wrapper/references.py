"""The plainest backend of each hook, for what is checked around a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail._markers import HookName, hookimpl
from dovetail.errors import ExportError
from dovetail.types import AccumulationStats, Artifact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dovetail.types import Array, Capability, ExportInputs, Runner, Sample


class PlantedError(Exception):
    """What a backend raises that was told to; nobody else raises it."""


class PlantedDovetailError(ExportError):
    """The same, of the family that a registry hands on as it is."""


class References:
    """A plugin with the plainest backend of each hook.

    Args:
        error: Raised by every hook instead of an answer.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error
        self.answers: list[object] = []
        """Every part that a hook returned."""

    def _answer(self, part: object) -> Any:
        if self._error is not None:
            raise self._error
        self.answers.append(part)
        return part

    @hookimpl
    def dovetail_compile(self, model: nn.Module) -> Any:
        """Leave the model as it is."""
        return self._answer(model)

    @hookimpl
    def dovetail_collate(self) -> Any:
        """Make a collator that stacks."""
        return self._answer(PlainCollator())

    @hookimpl
    def dovetail_accumulate(self, optimizer: Any) -> Any:
        """Make an accumulator that steps at once."""
        return self._answer(PlainAccumulator(optimizer))

    @hookimpl
    def dovetail_log(self) -> Any:
        """Make a tracker that remembers."""
        return self._answer(PlainTracker())

    @hookimpl
    def dovetail_export(self) -> Any:
        """Make an exporter that writes an empty file."""
        return self._answer(PlainExporter())


class PlainCollator:
    """Stacks every key."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return one batch."""
        import torch

        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class PlainAccumulator:
    """Steps after every micro-batch."""

    accumulation_steps = 1
    is_window_open = False
    last_window = None

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.effective_step = 0

    @property
    def stats(self) -> AccumulationStats:
        """Counts."""
        return AccumulationStats(self.effective_step, self.effective_step, 0, 1, False, None)

    def micro_batch(self, is_final_batch: bool = False) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def accumulate(
        self, loss: Tensor, model: nn.Module, weight: Any = 1, is_final_batch: bool = False
    ) -> bool:
        """Back-propagate and step."""
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.effective_step += 1
        return True

    def flush(self, model: nn.Module) -> bool:
        """Do nothing: no window is ever open."""
        return False

    def reset_epoch(self) -> None:
        """Do nothing: no window is ever open."""

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"effective_step": self.effective_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the count."""
        self.effective_step = state["effective_step"]


class PlainTracker:
    """Remembers the rows."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Remember a row."""
        self.rows.append((step, dict(metrics)))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Forget the settings."""

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Forget the picture."""

    def log_artifact(self, name: str, path: Path) -> None:
        """Forget the file."""

    def close(self, status: str) -> None:
        """Do nothing."""


class PlainExporter:
    """Writes an empty file, which answers with its inputs."""

    requirements = ("numpy>=1.26",)
    carries_code = False

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Write the file."""
        path = directory / "model.empty"
        path.touch()
        return Artifact("empty", path, (path,))

    def load(self, path: Path) -> Runner:
        """Return what answers with its inputs."""

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(inputs)

        return run


def call_hook(registry: Any, hook: HookName, name: str, directory: Path) -> Any:
    """Call one hook as a run calls it, with arguments of its kind; return its part."""
    import torch

    from dovetail.task import TaskSpec
    from dovetail.types import RunInfo

    model, options = torch.nn.Linear(2, 2), registry.build_options(hook, name, {})
    task = TaskSpec(name="conformance")
    if hook == "compile":
        return registry.compile(name, model, task, options)
    if hook == "collate":
        return registry.collate(name, task, options)
    if hook == "accumulate":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return registry.accumulate(name, model, optimizer, None, options)
    if hook == "log":
        return registry.log(name, RunInfo("conformance", "run", directory, {}), options)
    return registry.export(name, task, options)


def use_part(hook: HookName, part: Any, directory: Path) -> object:
    """Use a part as a run does; return what came of it, comparable."""
    import torch

    x = torch.arange(4.0).reshape(2, 2)
    if hook == "compile":
        return tuple(part(x).shape)
    if hook == "collate":
        batch = part([{"features": row} for row in x])
        return {key: value.tolist() for key, value in batch.items()}
    if hook == "accumulate":
        model = torch.nn.Linear(2, 2)
        with part.micro_batch():
            stepped = part.accumulate(model(x).mean(), model)
        return stepped, part.effective_step, part.state_dict()
    if hook == "log":
        part.log({"train/loss": 1.0}, 1)
        return part.capabilities, part.close("completed")
    artifact = part.export(torch.nn.Linear(2, 2), None, directory)
    return artifact.format, sorted(part.load(artifact.path)({"x": x.numpy()}))
