"""Turns a failure of compiled code into eager execution, from the state the call began in.

`nn.Module.compile` keeps the compiled form of a module in one attribute, which `__call__` looks
up. A guard takes that place: it calls the compiled form, and puts `None` there when that fails.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dovetail.errors import build_message

_SLOT = "_compiled_call_impl"
_WHERE = "plugin 'inductor' hook dovetail_compile"
_EAGER = "The model runs in eager execution from here on."
_PARTLY_EAGER = "Shapes that are compiled stay so, others run in eager execution."


def compile_in_place(model: nn.Module, **settings: Any) -> None:
    """Compile `model` in place, and let a failure of its compiled form fall back to eager.

    Args:
        model: The model.
        settings: Arguments of `torch.compile`.

    Raises:
        RuntimeError: This torch does not compile on this interpreter or platform.
    """
    model.compile(**settings)  # type: ignore[no-untyped-call,unused-ignore]  # untyped in older torch
    compiled = getattr(model, _SLOT, None)
    if compiled is None:
        warn_eager(
            f"torch {torch.__version__} keeps the compiled form of a module elsewhere",
            "A model that does not compile stops the run.",
        )
        return
    if type(model).forward.__module__.startswith("torch."):
        # Dynamo starts at no frame of torch's own files: nn.Sequential would stay eager unsaid.
        compiled = torch.compile(_outside_torch(model), **settings)
    setattr(model, _SLOT, _Guard(model, compiled))


def _outside_torch(model: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return eager(*args, **kwargs)

    eager: Callable[..., Any] = model._call_impl
    return call


def reason_of(error: Exception) -> str:
    """Return the class and the first line of what made compiling fail."""
    # Dynamo wraps what a backend raised; the first line of the wrapper names the backend only.
    cause = getattr(error, "inner_exception", None) or error
    first_line = next(iter(str(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {first_line}".rstrip(": ")


def warn_eager(reason: str, action: str = _EAGER) -> None:
    """Warn that a model, or a part of its calls, is not compiled."""
    warnings.warn(build_message(_WHERE, reason, action=action), UserWarning, stacklevel=3)


class _Guard:
    """Stands where `nn.Module.__call__` looks for its compiled form.

    A call with a signature that was not seen before may compile something. It is the one that is
    prepared for a failure; the others pay for reading the signature only, and should compiled
    code that ran before ever fail, its call is repeated from the state that it left.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._module = module
        self._compiled = compiled
        self._eager: Callable[..., Any] = module._call_impl
        self._seen: set[Hashable] = set()
        self._uncompiled: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An exporter or an outer torch.compile traces the model itself, not its compiled form.
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self._eager(*args, **kwargs)
        signature = self._signature(args, kwargs)
        if signature in self._uncompiled:
            return self._eager(*args, **kwargs)
        before = None if signature in self._seen else _State(self._module)
        try:
            if before is None:
                return self._compiled(*args, **kwargs)
            output = self._call_and_lower_backward(args, kwargs)
        except Exception as error:
            reason, is_limit = reason_of(error), _is_recompile_limit(error)
        else:
            self._seen.add(signature)
            return output
        # Outside of the except clause: the failed attempt's frames, and the tensors they hold,
        # are gone, and an error of the model itself surfaces without the compiler's around it.
        if before is not None:
            before.restore()
        output = self._eager(*args, **kwargs)
        if is_limit:
            self._leave_uncompiled(signature)
        else:
            self._undo(reason)
        return output

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        modes = self._module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return modes, autocast, _describe(args), _describe(kwargs)

    def _leave_uncompiled(self, signature: Hashable) -> None:
        if not self._uncompiled:
            warn_eager("torch's limit of recompilations is reached", _PARTLY_EAGER)
        self._uncompiled.add(signature)

    def _undo(self, reason: str) -> None:
        if getattr(self._module, _SLOT, None) is self:
            setattr(self._module, _SLOT, None)
        warn_eager(reason)

    def _call_and_lower_backward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graphs = _num_graphs()
        with _strict_config():
            output = self._compiled(*args, **kwargs)
            if not _lowers_backward_in_forward() and _num_graphs() > graphs:
                self._probe_backward(output, (args, kwargs))
        return output

    def _probe_backward(self, output: Any, inputs: Any) -> None:
        """Run the backward once, with zeros, so that it is compiled; drop what it computes."""
        module = self._module
        # Their backward communicates, and another rank may have nothing to compile in this call.
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()) or any(
            hasattr(p, "device_mesh") for p in module.parameters()
        ):
            return
        outputs = [t for t in _tensors(output) if t.requires_grad]
        leaves = [t for t in chain(module.parameters(), _tensors(inputs)) if t.requires_grad]
        if outputs and leaves:
            zeros = [torch.zeros_like(t) for t in outputs]
            torch.autograd.grad(outputs, leaves, zeros, retain_graph=True, allow_unused=True)


class _State:
    """Random states and buffers before a call."""

    def __init__(self, module: nn.Module) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        tensors = chain(module.parameters(), module.buffers())
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        self._devices = [(d, _rng(d).get_rng_state(*_rng_args(d))) for d in devices]
        self._buffers = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _rng(device).set_rng_state(state, *_rng_args(device))
        for owner, name, buffer, value in self._buffers:
            if getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)
            # Writing what is there already would invalidate an earlier forward's saved tensors.
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _rng(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _rng_args(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # mps has one device and takes no argument


def _lowers_backward_in_forward() -> bool:
    """Tell whether this torch can compile a backward graph together with its forward."""
    import torch._functorch.config as functorch_config

    return hasattr(functorch_config, "force_non_lazy_backward_lowering")


def _strict_config() -> ExitStack:
    """Make torch raise, and raise in the forward, where it would go on or fail later."""
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config

    settings = {"fail_on_recompile_limit_hit": True, "suppress_errors": False}
    stack = ExitStack()
    stack.enter_context(dynamo_config.patch(settings))
    # The probe runs the backward of a graph that is needed again, which a compiled backward that
    # recycles the forward's buffers refuses.
    lowering = (
        {"force_non_lazy_backward_lowering": True}
        if _lowers_backward_in_forward()
        else {"donated_buffer": False}
    )
    stack.enter_context(functorch_config.patch(lowering))
    return stack


def _is_recompile_limit(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return isinstance(error, FailOnRecompileLimitHit)


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _children(value: Any) -> Iterable[tuple[Hashable, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return ()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for _, child in _children(value):
        yield from _tensors(child)


def _describe(value: Any) -> Hashable:
    """Return what a graph may be specialised to: of tensors the form, of switches the value."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if value is None or isinstance(value, (bool, str)):
        return value
    return type(value), tuple((name, _describe(child)) for name, child in _children(value))
