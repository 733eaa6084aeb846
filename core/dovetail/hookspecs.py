"""The five contracts between dovetail and its plugins.

A hook fires once per run and returns a part; the part does the work. Only the registry calls
hooks, and only the backends that the config names are asked. `options` is always the validated
instance of the model that the implementation's own `options` parameter is annotated with. An
implementation takes any subset of the arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail._markers import hookspec
from dovetail.deprecations import warnings_of

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from dovetail.task import TaskSpec
    from dovetail.types import Accumulator, Collator, Exporter, RunInfo, Tracker


@hookspec(firstresult=True, **warnings_of("dovetail_compile"))
def dovetail_compile(model: nn.Module, task: TaskSpec, options: Any) -> nn.Module | None:
    """Make the model faster without changing what it computes.

    - **When:** after the model is built and moved to its device, before the first batch.
    - **How often:** once per run, and not at all while `compile.use` is `"off"`, the default.
    - **Answers:** one, from the backend that `compile.use` names.
    - **Order:** wrappers in the order of `[run] plugins`, around the backend.
    - **Without an implementation:** the model stays as it is.
    - **Ownership:** the model is the plugin's to change in place. The keys of its `state_dict`
      and its class must stay as they are. A failure of compiled code, also one that shows only at
      the first forward or backward, is the plugin's to turn into eager execution and a warning.

    Args:
        model: The model on its device, in training mode.
        task: What the model is trained for.
        options: The backend's options.

    Returns:
        The model to train, usually the same object.
    """


@hookspec(firstresult=True, **warnings_of("dovetail_collate"))
def dovetail_collate(task: TaskSpec, options: Any) -> Collator | None:
    """Make the collator that turns samples into batches.

    - **When:** before the data loaders are built.
    - **How often:** once per run; once more where `"auto"` has to ask every collator.
    - **Answers:** one. `collate.use = "auto"` takes the backend named like the task's modality; if
      there is none, every installed collator is asked, and exactly one must answer.
    - **Order:** wrappers in the order of `[run] plugins`, around the backend.
    - **Without an implementation:** an error that lists the installed collators.
    - **Ownership:** `task` is frozen. The collator belongs to the run; it is pickled to workers.

    Args:
        task: What the data is for.
        options: The backend's options.

    Returns:
        The collator, or `None` for a task that is not this plugin's.
    """


@hookspec(firstresult=True, **warnings_of("dovetail_accumulate"))
def dovetail_accumulate(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, options: Any
) -> Accumulator | None:
    """Make the accumulator that owns backward, clipping and the optimizer step.

    - **When:** after model and optimizer are built, before the first batch.
    - **How often:** once per run.
    - **Answers:** one, from the backend that `accumulate.use` names (`"exact"` by default).
    - **Order:** wrappers in the order of `[run] plugins`, around the backend.
    - **Without an implementation:** an error; a run cannot do without.
    - **Ownership:** from here on only the accumulator steps the optimizer, updates the scaler and
      writes gradients. The loop steps the scheduler, when `accumulate` returned `True`.

    Args:
        model: The model as it is trained.
        optimizer: Its optimizer.
        scaler: The gradient scaler of an fp16 run, else `None`.
        options: The backend's options.

    Returns:
        The accumulator.
    """


@hookspec(firstresult=True, **warnings_of("dovetail_log"))
def dovetail_log(run: RunInfo, options: Any) -> Tracker | None:
    """Make a tracker that follows the run's metric log.

    - **When:** when the run's folder exists, before the first step; never in the step.
    - **How often:** once per run and named backend.
    - **Answers:** all: each backend in `log.use` is asked for its own tracker.
    - **Order:** the order of `log.use`; wrappers in the order of `[run] plugins` around each.
    - **Without an implementation:** the metric log itself is always written.
    - **Where:** in the process of the trackers, which imports no torch. In the training's process
      if the options have a true `needs_training_process`, `log.follow` says "thread", or the
      plugin was registered in a session.
    - **Ownership:** a tracker owns a folder of its name in the run's folder. What it raises is
      retried, then parks that tracker; the run and the other trackers go on.

    Args:
        run: Name, id, folder and settings of the run.
        options: The backend's options.

    Returns:
        The tracker.
    """


@hookspec(firstresult=True, **warnings_of("dovetail_export"))
def dovetail_export(task: TaskSpec, options: Any) -> Exporter | None:
    """Make an exporter for one format.

    - **When:** before training, so that a bad choice fails early; it works after training.
    - **How often:** once per run and named backend.
    - **Answers:** all: each backend in `export.use` is asked for its own exporter.
    - **Order:** the order of `export.use`; wrappers in the order of `[run] plugins` around each.
    - **Without an implementation:** no bundle is built.
    - **Ownership:** the exporter writes only into the folder it is given and leaves the model as
      it was. One format that fails does not stop the others.

    Args:
        task: What the model was trained for.
        options: The backend's options.

    Returns:
        The exporter.
    """
