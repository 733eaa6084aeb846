"""The gradients of an optimizer's parameters: found, measured, averaged, saved and restored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.errors import CheckpointError, build_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Parameter]:
    """Return the parameters in the order of the groups.

    Not cached: the groups may change, and a walk costs less than the look at each `grad`.
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that exist, dense; changing them in place changes the parameters'.

    Of a sparse gradient these are the values, each index once.
    """
    parameters = parameters_of(optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(gradient.is_sparse for gradient in gradients):
        return gradients
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    return [
        p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None
    ]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients as one vector, shape `()`.

    Of sharded gradients it is that of the whole, for which all ranks must call this.

    Source: `torch.nn.utils.get_total_norm`, less its grouping by device and dtype, which costs
    more than the norms of a small model.
    """
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    if not any(hasattr(norm, "full_tensor") for norm in norms):
        return _norm_of(norms)
    # Sharded ones do not mix with plain ones, nor with those of another mesh.
    meshes: dict[Any, list[Tensor]] = {}
    for norm in norms:
        meshes.setdefault(getattr(norm, "device_mesh", None), []).append(norm)
    return _norm_of([_whole(_norm_of(some)) for some in meshes.values()])


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply the gradients by `factor` in place, each rank the shards it has."""
    with torch.no_grad():
        local = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
        torch._foreach_mul_(local, factor)


def _norm_of(norms: Sequence[Tensor]) -> Tensor:
    device = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return total


def _whole(norm: Tensor) -> Tensor:
    # Of a shard it is a sum over the ranks that is still to be made.
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def average_over_ranks(optimizer: Optimizer) -> None:
    """Average the gradients over the ranks in place, as DistributedDataParallel would have."""
    num_ranks = dist.get_world_size()
    for parameter in parameters_of(optimizer):
        if parameter.requires_grad:
            # A rank that did not use a parameter still takes part.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(num_ranks)


def copy_gradients(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return copies of the gradients that exist, by the position of their parameters."""
    return {
        position: parameter.grad.detach().clone()
        for position, parameter in enumerate(parameters_of(optimizer))
        if parameter.grad is not None
    }


def restore_gradients(optimizer: Optimizer, gradients: Mapping[int, Tensor]) -> None:
    """Set the gradients to copies of what `copy_gradients` returned, and the others to `None`.

    Raises:
        CheckpointError: A gradient has no parameter of its shape. Nothing was changed then.
    """
    parameters = parameters_of(optimizer)
    shapes = [tuple(parameter.shape) for parameter in parameters]
    for position, gradient in gradients.items():
        if position >= len(shapes) or tuple(gradient.shape) != shapes[position]:
            raise CheckpointError(
                build_message(
                    f"accumulator state: gradient {position}",
                    f"shape {tuple(gradient.shape)}",
                    f"shape {shapes[position]}"
                    if position < len(shapes)
                    else f"one of {len(shapes)} parameters",
                    "Load it with the model and optimizer that it was saved with.",
                )
            )
    for position, parameter in enumerate(parameters):
        saved = gradients.get(position)
        parameter.grad = None if saved is None else saved.to(parameter, copy=True)
