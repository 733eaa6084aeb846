"""How a batch meets a model: inputs by the names its forward takes, outputs by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail.errors import ModelError, build_message

if TYPE_CHECKING:
    from torch import Tensor, nn

LABELS = "labels"
"""Key of the targets in a batch."""

PRIMARY_OUTPUT = "logits"
"""Name of a model's only output, and the field a loss is computed from."""

_NOT_OUTPUTS = frozenset(
    {"loss", "past_key_values", "hidden_states", "attentions", "cross_attentions"}
)


def bind_inputs(
    model: nn.Module, names: Sequence[str], *, needs_labels: bool = False
) -> tuple[tuple[str, ...], bool]:
    """Choose which of a batch's tensors a model is called with.

    Args:
        model: The model; a wrapper's inner module is looked at.
        names: Keys of a batch, in order.
        needs_labels: Whether the model computes its own loss and gets the labels.

    Returns:
        The names to pass, and whether they are passed by keyword. Labels are passed only if the
        signature cannot do without them, or takes them and the model computes its own loss.

    Raises:
        ModelError: Forward requires something the batch does not have.
    """
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = [p.name for p in named if p.default is p.empty]
    inputs = [n for n in names if n != LABELS]
    taken = [n for n in inputs if takes_any or any(p.name == n for p in named)]
    takes_labels = takes_any or any(p.name == LABELS for p in named)
    if LABELS in names and (LABELS in required or (needs_labels and takes_labels)):
        taken.append(LABELS)
    missing = [n for n in required if n not in taken]
    if not missing and (taken or not inputs):
        return tuple(taken), True
    # `forward(self, x)` and a batch with one input: there is only one way to understand that.
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if len(inputs) == 1 and positional and len(missing) <= 1 and not taken:
        return (inputs[0],), False
    where = f"model {type(unwrap(model)).__name__}.forward"
    found = f"requires {', '.join(missing) or 'no input of the batch'}"
    expected = f"parameters named like the batch's keys: {', '.join(names)}"
    hint = "Rename the parameters, or the keys of the samples."
    raise ModelError(build_message(where, found, expected, hint))


def build_call(
    model: nn.Module, names: Sequence[str], *, needs_labels: bool = False
) -> Callable[[Mapping[str, Tensor]], Any]:
    """Return a function that calls `model` with the tensors of a batch it takes.

    Args:
        model: The model, as it is called.
        names: Keys of the batches, in order.
        needs_labels: Whether the model computes its own loss and gets the labels.

    Raises:
        ModelError: Forward requires something the batch does not have.
    """
    chosen, by_keyword = bind_inputs(model, names, needs_labels=needs_labels)
    if not by_keyword:
        only = chosen[0]
        return lambda batch: model(batch[only])
    if len(chosen) == 1:
        only = chosen[0]
        return lambda batch: model(**{only: batch[only]})
    return lambda batch: model(**{name: batch[name] for name in chosen})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside wrappers that keep it as `module` or `_orig_mod`."""
    inner: Any = model
    while True:
        modules = getattr(inner, "_modules", {})
        wrapped = modules.get("_orig_mod")
        if wrapped is None and type(inner).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "FullyShardedDataParallel",
        ):
            wrapped = modules.get("module")
        if wrapped is None:
            unwrapped: nn.Module = inner
            return unwrapped
        inner = wrapped


def name_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return a model's output tensors by name, the one for the loss first.

    Args:
        outputs: A tensor, a tuple or list, a mapping or an HF ModelOutput.

    Returns:
        `logits` for a tensor or the first of a tuple; a mapping's tensors under their own names
        with `logits` first where there is one. Losses, caches and hidden states are left out.

    Raises:
        ModelError: There is no tensor in it.
    """
    import torch

    if isinstance(outputs, torch.Tensor):
        return {PRIMARY_OUTPUT: outputs}
    named: dict[str, Tensor] = {}
    if isinstance(outputs, Mapping):
        fields = {k: v for k, v in outputs.items() if k not in _NOT_OUTPUTS}
        named = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        if PRIMARY_OUTPUT in named:
            named = {PRIMARY_OUTPUT: named[PRIMARY_OUTPUT], **named}
    elif isinstance(outputs, tuple | list):
        tensors = [v for v in outputs if isinstance(v, torch.Tensor)]
        named = {PRIMARY_OUTPUT if i == 0 else f"output_{i}": v for i, v in enumerate(tensors)}
    if not named:
        expected = "a tensor, a tuple whose first item is one, a dict or a ModelOutput"
        raise ModelError(build_message("model output", f"is a {type(outputs).__name__}", expected))
    return named


def primary_output(outputs: Any) -> Tensor:
    """Return the output tensor the loss is computed from.

    Raises:
        ModelError: There is no tensor in it.
    """
    named = name_outputs(outputs)
    return named[PRIMARY_OUTPUT] if PRIMARY_OUTPUT in named else next(iter(named.values()))
