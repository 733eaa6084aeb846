"""The model as it is served: preprocessing, the trained model, named tensors in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dovetail.errors import ExportError, build_message
from dovetail.signature import bind_inputs, name_outputs, unwrap


class ServedModel(nn.Module):
    """What every artifact computes: the collator's `device_transform`, then the trained model.

    It holds the caller's own modules, not copies.

    Args:
        model: The trained model; a wrapper such as DDP's is taken off.
        names: Keys of a batch that may be inputs, in order. Those that the model's forward takes
            become the inputs.
        transform: Applied to the first input; `None` for none.

    Raises:
        ModelError: Forward requires something the batch does not have.
    """

    transform: nn.Module
    model: nn.Module

    def __init__(
        self, model: nn.Module, names: Sequence[str], transform: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.transform = nn.Identity() if transform is None else transform
        self.model = unwrap(model)
        self.input_names, self._is_by_keyword = bind_inputs(self.model, names)
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for `tensors`, which come in the order of `input_names`."""
        return tuple(self.named_forward(*tensors).values())

    def named_forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, `logits` first where there are logits.

        bfloat16, which arrays at the border of a bundle do not have, is widened to float32.

        Raises:
            ModelError: The model returns no tensor.
        """
        values = (self.transform(tensors[0]), *tensors[1:])
        if self._is_by_keyword:
            raw = self.model(**dict(zip(self.input_names, values, strict=True)))
        else:
            raw = self.model(*values)
        outputs = name_outputs(raw)
        return {
            name: value.float() if value.dtype is torch.bfloat16 else value
            for name, value in outputs.items()
        }


@contextmanager
def served_in_eval(served: ServedModel) -> Iterator[ServedModel]:
    """Hold a model in eval mode, eager and on the CPU, and put everything back afterwards.

    Training mode of every submodule, storage of every parameter and buffer, gradients, in-place
    compilation and wrappers inside the model come back as they were, after an exception too.
    """
    with ExitStack() as undo:
        for module in list(served.modules()):
            undo.callback(setattr, module, "training", module.training)
            _drop_compilation(module, undo)
            for name, child in module.named_children():
                if unwrap(child) is not child:
                    undo.callback(setattr, module, name, child)
                    setattr(module, name, unwrap(child))
        for tensor in (*served.parameters(), *served.buffers()):
            _move_to_cpu(tensor, undo)
        # The fused encoder path writes zeros at padding where the plain one writes numbers, and
        # cannot be exported: the reference is the plain one.
        undo.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        served.eval()
        undo.enter_context(torch.no_grad())
        yield served


def _drop_compilation(module: nn.Module, undo: ExitStack) -> None:
    compiled = module._compiled_call_impl
    if compiled is not None:
        undo.callback(setattr, module, "_compiled_call_impl", compiled)
        module._compiled_call_impl = None


def _move_to_cpu(tensor: Tensor, undo: ExitStack) -> None:
    # Gradients are set aside: they would be traced along, and stay on the other device.
    if tensor.is_leaf:
        undo.callback(setattr, tensor, "grad", tensor.grad)
        tensor.grad = None
    if tensor.device.type != "cpu":
        # Restoring the old storage costs nothing and keeps whatever else points at it.
        undo.callback(setattr, tensor, "data", tensor.data)
        tensor.data = tensor.data.cpu()


def check_weights(served: ServedModel) -> None:
    """Refuse weights that no training can have meant.

    Raises:
        ExportError: A parameter holds NaN or infinity, or a buffer NaN.
    """
    for name, parameter in served.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            _refuse(name, int((~torch.isfinite(parameter)).sum()), parameter.numel())
    for name, buffer in served.named_buffers():  # a mask may hold infinity on purpose
        if bool(torch.isnan(buffer).any()):
            _refuse(name, int(torch.isnan(buffer).sum()), buffer.numel())


def _refuse(name: str, count: int, total: int) -> None:
    found = f"{count} of {total} values are NaN or infinite"
    action = "Export an earlier checkpoint, or train with a lower learning rate."
    raise ExportError(build_message(f"model weight {name!r}", found, "finite numbers", action))
