"""Compiles the model in place with `torch.compile`; what fails falls back to eager, aloud.

`torch.compile` returns at once and fails later: at the first forward, or, for the backward graph,
at the first `backward()`, when the loss is already computed. Here both are brought to the forward
that causes them, where the call can be repeated in eager execution from the state it began in.

In place means that the keys of `state_dict`, the class and hooks registered later stay as they
are. `copy.deepcopy` and pickling drop an in-place compilation: the copy runs eagerly until it is
compiled itself.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from pydantic import field_validator, model_validator
from torch import nn

from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError, build_message, did_you_mean
from dovetail_plugins.compile.fallback import compile_in_place, reason_of, warn_eager

dovetail_api = 1

Mode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune"]


class Options(PluginOptions):
    """Options of the inductor backend."""

    mode: Mode = "default"
    """How long the compiler may search: `reduce-overhead` adds CUDA graphs, `max-autotune` also
    times kernels against each other."""
    fullgraph: bool = False
    """Treat a model that does not compile as one single graph as a failure."""
    dynamic: bool = True
    """Compile one graph for all batch sizes and lengths. Without it each new shape compiles anew,
    and beyond torch's recompile limit torch runs new shapes uncompiled."""
    backend: str = "inductor"
    """Dynamo backend; `torch.compiler.list_backends(())` lists them."""

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, backend: str) -> str:
        known = torch.compiler.list_backends(())  # those for debugging too
        if backend not in known:
            raise ValueError(
                f"got {backend!r}; expected one of {', '.join(known)}. "
                f"{did_you_mean(backend, known)}".rstrip()
            )
        return backend

    @model_validator(mode="after")
    def _check_mode(self) -> Options:
        if self.mode != "default" and self.backend != "inductor":
            raise ValueError(
                f"mode {self.mode!r} belongs to the backend 'inductor', not to {self.backend!r}"
            )
        return self


@hookimpl
def dovetail_compile(model: nn.Module, options: Options) -> nn.Module:
    """Compile `model` in place and return it.

    The first forward that fails to compile, or whose backward fails to compile, is repeated
    eagerly from the same random state and the same buffers, so that its loss is that of an eager
    model. One `UserWarning` names the reason, and the model stays eager. What the model does to
    other Python objects before a failure is not undone.
    """
    if not hasattr(torch, "compile"):
        warn_eager("PyTorch < 2.0 has no torch.compile")
        return model
    mode = options.mode if options.backend == "inductor" else None
    try:
        compile_in_place(
            model,
            backend=options.backend,
            mode=mode,
            fullgraph=options.fullgraph,
            dynamic=options.dynamic,
        )
    except Exception as error:  # an interpreter or platform that dynamo refuses
        warn_eager(reason_of(error))
    return model


def compile_model(
    model: nn.Module, mode: Mode | None = None, fullgraph: bool = False, dynamic: bool = True
) -> nn.Module:
    """Compile `model` in place, for a training loop of one's own.

    Args:
        model: The model on its device, before `DistributedDataParallel` wraps it.
        mode: "default", "reduce-overhead" or "max-autotune"; `None` leaves the model eager.
        fullgraph: Treat a model that does not compile as one single graph as a failure.
        dynamic: Compile one graph for all batch sizes and lengths.

    Returns:
        The same object.

    Raises:
        ConfigError: The mode is unknown.
    """
    if mode is None:
        return model
    known = get_args(Mode)
    if mode not in known:
        expected = f"None or one of {', '.join(map(repr, known))}"
        raise ConfigError(
            build_message(
                "compile_model mode", f"got {mode!r}", expected, did_you_mean(mode, known)
            )
        )
    options = Options(mode=mode, fullgraph=fullgraph, dynamic=dynamic)
    dovetail_compile(model, options)
    return model
