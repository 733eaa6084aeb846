"""The floating-point operations of training: counted once, never guessed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BACKWARD_AND_FORWARD = 3
"""FLOPs of forward and backward over those of the forward: the backward computes a gradient for
the inputs and one for the weights of each product. Recomputed activations do not count.

Source: Chowdhery et al. 2022 (PaLM), appendix B; Kaplan et al. 2020, section 2.1.
"""

_MAX_FROZEN = 0.01
"""Share of frozen weights above which three forwards are too many for a step."""


@dataclass(frozen=True)
class FlopCount:
    """What one forward pass of a model costs."""

    forward: int
    """FLOPs of the pass, a multiplication and an addition each being one."""
    num_elements: int
    """Elements of the primary input that went through it: tokens of a text, pixels of an image."""
    is_convolutional: bool
    """Whether most of them are convolutions."""

    @property
    def training_per_element(self) -> float:
        """FLOPs that training, forward and backward, takes for each element of the input."""
        return _BACKWARD_AND_FORWARD * self.forward / self.num_elements


class FlopMeter:
    """Keeps what `count_flops` finds, for whoever needs it later."""

    def __init__(self) -> None:
        self.count: FlopCount | None = None
        """The last count; `None` before the first, and where there is none that is true."""

    def measure(self, forward: Callable[[], object], model: nn.Module, num_elements: int) -> None:
        """Count one forward pass; see `count_flops`."""
        self.count = count_flops(forward, model, num_elements)


def count_flops(
    forward: Callable[[], object], model: nn.Module, num_elements: int
) -> FlopCount | None:
    """Count the operations of one forward pass with torch's own counter.

    It knows matrix products, convolutions and attention, the bulk of every common model. Buffers
    of the model are as before when it is done; to keep gradients off and to restore the random
    generators is the caller's part.

    Args:
        forward: Runs the pass, loss included; called once.
        model: What it runs; not compiled yet.
        num_elements: Elements of the primary input.

    Returns:
        The count, or `None` where it would not be true: the pass does not run under the counter,
        does nothing that it knows, holds recurrent layers, which it leaves out, or trains only a
        part of the weights, so that the backward pass costs less than two forwards.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if num_elements <= 0 or not _is_countable(model):
        return None
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
    try:
        with (
            warnings.catch_warnings(),
            _unchanged_buffers(model),
            _without_fused_layers(),
            counter,
        ):
            warnings.simplefilter("ignore")  # whatever there is to say was said by the real pass
            forward()
    except Exception:  # a kernel that the counter cannot see through is no fault of the model
        return None
    by_operation: Mapping[Any, int] = counter.get_flop_counts().get("Global", {})
    total = sum(by_operation.values())
    if total <= 0:
        return None
    convolutions = sum(n for name, n in by_operation.items() if "convolution" in str(name))
    return FlopCount(total, num_elements, is_convolutional=2 * convolutions > total)


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Return formulas that releases of torch before 2.15 lack: attention on the CPU."""
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count

    formula: Callable[..., int] = sdpa_flop_count

    def attend(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
        return formula(query, key, value)

    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {} if operation in flop_registry else {operation: attend}


def _is_countable(model: nn.Module) -> bool:
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return False
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    frozen = sum(size for size, is_trained in sizes if not is_trained)
    return frozen <= _MAX_FROZEN * sum(size for size, _ in sizes)


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Take back what a pass writes into buffers: a model may count its calls, say."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Keep torch's encoder layers from one fused operation, of which the counter knows nothing."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def count_elements(batch: Mapping[str, Tensor], name: str) -> int:
    """Return the elements of a batch's primary input, or of its first one where that has no name.

    Args:
        batch: Tensors by name.
        name: The primary input's name.
    """
    tensor = batch.get(name)
    return (next(iter(batch.values())) if tensor is None else tensor).numel()


@dataclass(frozen=True)
class _Peak:
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None


# Dense, in TFLOP/s; products accumulate in fp32. A device that is a slice of one of these (MIG)
# has another name and no entry.
_PEAKS = {
    # NVIDIA H100 and H200 Tensor Core GPU data sheets; their figures "with sparsity", halved.
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": _Peak(67.0, 494.7, 989.4, 989.4),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": _Peak(60.0, 417.5, 835.5, 835.5),
    r"NVIDIA H100 PCIe": _Peak(51.2, 378.0, 756.5, 756.5),
    # NVIDIA A100, A30, A40 and A10 Tensor Core GPU data sheets.
    r"(NVIDIA )?A100-(SXM4|SXM|PCIE|PG509)-\d+GB|NVIDIA A100 \d+GB PCIe": _Peak(
        19.5, 156, 312, 312
    ),
    r"NVIDIA A30": _Peak(10.3, 82.0, 165.0, 165.0),
    r"NVIDIA A40": _Peak(37.4, 74.8, 149.7, 149.7),
    r"NVIDIA A10": _Peak(31.2, 62.5, 125.0, 125.0),
    # NVIDIA L4 and L40S data sheets.
    r"NVIDIA L4": _Peak(30.3, 60.0, 121.0, 121.0),
    r"NVIDIA L40S": _Peak(91.6, 183.0, 362.0, 362.0),
    # NVIDIA V100 and T4 Tensor Core GPU data sheets: no TF32, no bf16.
    r"Tesla V100-SXM2-\d+GB(-LS)?": _Peak(15.7, None, 125.0, None),
    r"Tesla V100-PCIE-\d+GB": _Peak(14.0, None, 112.0, None),
    r"(NVIDIA |Tesla )T4": _Peak(8.1, None, 65.0, None),
    # NVIDIA Ada GPU architecture white paper, appendix A; fp16 with fp32 accumulation.
    r"NVIDIA GeForce RTX 4090": _Peak(82.6, 82.6, 165.2, 165.2),
    # NVIDIA Ampere GA102 GPU architecture white paper, appendix A; likewise.
    r"NVIDIA GeForce RTX 3090": _Peak(35.6, 35.6, 71.0, 71.0),
}


def peak_flops(device_name: str, precision: str, *, allows_tf32: bool = False) -> float | None:
    """Return what a device can do at most, in FLOP/s, or `None` where nobody told us.

    Args:
        device_name: As `torch.cuda.get_device_name` tells it.
        precision: "fp32", "bf16" or "fp16".
        allows_tf32: Whether products in fp32 may run as TF32.
    """
    for pattern, peak in _PEAKS.items():
        if re.fullmatch(pattern, device_name):
            by_format = {"fp32": peak.fp32, "tf32": peak.tf32, "bf16": peak.bf16, "fp16": peak.fp16}
            is_tf32 = precision == "fp32" and allows_tf32 and peak.tf32 is not None
            tflops = by_format["tf32" if is_tf32 else precision]
            return None if tflops is None else tflops * 1e12
    return None


def peak_of(device: torch.device, precision: str, count: FlopCount) -> float | None:
    """Return what the device of a run can do at most at its precision, in FLOP/s.

    Args:
        device: The run's device; only those of CUDA are known.
        precision: "fp32", "bf16" or "fp16".
        count: Says whether torch's switch for convolutions or that for products decides on TF32.
    """
    if device.type != "cuda":
        return None
    allows_tf32 = (
        torch.backends.cudnn.allow_tf32
        if count.is_convolutional
        else torch.get_float32_matmul_precision() != "highest"
    )
    name = torch.cuda.get_device_name(device)
    return peak_flops(name, precision, allows_tf32=allows_tf32)
