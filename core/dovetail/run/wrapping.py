"""A model for several ranks: DDP copies it to each, FSDP2 divides it among them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dovetail.config import DistributedConfig
from dovetail.run.distributed import Ranks

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def wrap_model(
    model: nn.Module, config: DistributedConfig, ranks: Ranks, device: torch.device
) -> nn.Module:
    """Return what the ranks train: the model itself for one process.

    Args:
        model: On its device, compiled if it is to be; the same class on every rank. With FSDP2 it
            is changed in place.
        config: The `distributed` section.
        ranks: All of them call this together. They get rank 0's weights.
        device: Where the model is.
    """
    if ranks.size == 1:
        return model
    share_tensors(model.buffers())
    if config.strategy == "fsdp":
        for parameter in model.parameters():
            share_tensors([parameter])
        return _shard(model, config, device)
    from torch.nn.parallel import DistributedDataParallel

    # Buffers at each forward pass are too often: the loop shares them once per optimizer step.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device],
        find_unused_parameters=config.find_unused_parameters,
        **settings,
    )


def _shard(model: nn.Module, config: DistributedConfig, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    dtype = _DTYPES[config.param_dtype]
    has_gpu = device.type != "cpu"
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=has_gpu)
        if config.offload
        else OffloadPolicy(),
    }
    # The blocks of a stack are gathered one at a time; the rest of the model as one.
    for block in find_blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return model


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules in `ModuleList`s, innermost first, as a stack of layers is written."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for stack in stacks for block in stack if any(True for _ in block.parameters())]
    return list(dict.fromkeys(reversed(blocks)))


def copy_hollow(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights have no memory yet; see `give_memory`."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in saved:
            hollow = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = (
                nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
            )
    return copy.deepcopy(model, memo)


def give_memory(hollow: nn.Module, device: torch.device) -> nn.Module:
    """Give the weights of a hollow copy memory, with nothing of value in it, and return it."""
    made: dict[int, Tensor] = {}
    for module in hollow.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if tensor.is_meta:  # tied weights stay tied
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                setattr(module, name, made[id(tensor)])
    return hollow


def list_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers that are saved, such as the statistics of a BatchNorm."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return [buffer for buffer in model.buffers() if id(buffer) in saved]


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's, in one broadcast per dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(alike, torch.split(flat, [t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the whole weights of a divided model, on the CPU; `None` if it is not divided.

    All ranks call this together.
    """
    state = model.state_dict()
    if not any(map(is_divided, state.values())):
        return None
    return {name: make_whole(value) for name, value in state.items()}


class WholeOptimizer:
    """An optimizer's state as one process would save it, whoever has which part of it.

    Args:
        optimizer: Over the parameters as they are trained.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state with whole tensors; all ranks call this together."""
        whole: dict[str, Any] = _map_tensors(self._optimizer.state_dict(), make_whole)
        return whole

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; each rank takes its part."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        parts = {
            position: {
                name: _divide_like(value, parameters[position]) for name, value in of.items()
            }
            for position, of in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": parts})


def is_divided(value: Any) -> bool:
    """Return whether a tensor is divided among the ranks."""
    return hasattr(value, "full_tensor")


def make_whole(tensor: Tensor) -> Tensor:
    """Return a tensor, a divided one whole and on the CPU; all ranks call this together."""
    divided: Any = tensor
    if not is_divided(divided):
        return tensor
    # Parts that are kept in host memory meet where the ranks do.
    whole: Tensor = divided.detach().to(divided.device_mesh.device_type).full_tensor().cpu()
    return whole


def _divide_like(value: Any, parameter: Any) -> Any:
    is_like = isinstance(value, Tensor) and value.shape == parameter.shape
    if not (is_like and is_divided(parameter)):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    # Every rank has the whole tensor: nothing needs to be sent.
    part = distribute_tensor(
        value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )
    return part.to(parameter.device)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, change) for item in value]
    return value
