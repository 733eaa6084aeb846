"""The signature of a bundle: name, dtype and shape of every input and output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, get_args

from dovetail.errors import ExportError, build_message
from dovetail.task import DType, TaskSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from dovetail.bundle.golden import GoldenCase

    Batch = Mapping[str, Tensor]

BATCH = "batch"
"""Name of the dimension that counts samples."""

_TO_CASES = "Give it batches of one data set, of several sizes and lengths."


def read_input_specs(
    task: TaskSpec, names: Sequence[str], batches: Sequence[Batch], *, has_transform: bool
) -> tuple[TensorSpec, ...]:
    """Describe the inputs: as the task says, else as the batches show.

    Args:
        task: Its `inputs` name the dimensions where they are given.
        names: The inputs, in order.
        batches: The example and all golden batches. A dimension that differs among them varies.
            Dimension 0 is "batch"; dimension 1 of a text's tokens and masks is "sequence".
        has_transform: Whether the first input is transformed before the model sees it. The task
            speaks of what the model takes, so that input's dtype and sizes are the batches'.

    Raises:
        ExportError: The batches contradict the task or each other.
    """
    given = {spec.name: spec for spec in task.inputs if spec.shape}
    dimensions = _Dimensions(task, names, batches)
    specs = []
    for name in names:
        tensor = batches[0][name]
        shape = dimensions.of(name)
        if name in given:
            is_own = has_transform and name == names[0]
            shape = _merge(given[name], tensor, is_own)
        specs.append(TensorSpec(name=name, dtype=_dtype_name(name, tensor), shape=shape))
    return tuple(specs)


class _Dimensions:
    """Names the dimensions of the batches by how their sizes go together."""

    def __init__(self, task: TaskSpec, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._is_text = task.modality == "text" or task.counts_tokens
        self._batch_sizes = self._sizes(names[0], 0)
        self._by_sizes: dict[tuple[int, ...], str] = {}

    def _sizes(self, name: str, axis: int) -> tuple[int, ...]:
        return tuple(batch[name].shape[axis] for batch in self._batches)

    def of(self, name: str) -> tuple[int | str, ...]:
        rank = self._batches[0][name].ndim
        if any(batch[name].ndim != rank for batch in self._batches):
            _refuse(name, "has a different number of dimensions in different batches")
        return tuple(self._name(name, axis) for axis in range(rank))

    def _name(self, name: str, axis: int) -> int | str:
        tensor, sizes = self._batches[0][name], self._sizes(name, axis)
        if axis == 0 and sizes == self._batch_sizes:
            return BATCH
        if sizes in self._by_sizes and len(set(sizes)) > 1:
            return self._by_sizes[sizes]
        is_token_axis = axis == 1 and tensor.ndim == 2 and not tensor.is_floating_point()
        if self._is_text and is_token_axis:
            wanted = "target_sequence" if name.startswith("decoder_") else "sequence"
            is_taken = wanted in self._by_sizes.values() and self._by_sizes.get(sizes) != wanted
            return self._by_sizes.setdefault(sizes, f"{name}_length" if is_taken else wanted)
        if len(set(sizes)) == 1:
            return sizes[0]
        return self._by_sizes.setdefault(sizes, f"{name}_{axis}")


def _merge(spec: TensorSpec, tensor: Tensor, is_own: bool) -> tuple[int | str, ...]:
    if len(spec.shape) != tensor.ndim:
        _refuse(spec.name, f"has shape {tuple(tensor.shape)}", f"{len(spec.shape)} dimensions")
    shape = tuple(
        size if is_own and isinstance(said, int) else said
        for said, size in zip(spec.shape, tensor.shape, strict=True)
    )
    bind_sizes((TensorSpec(name=spec.name, shape=shape),), {spec.name: tuple(tensor.shape)})
    return shape


def bind_sizes(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the size of each dimension that varies.

    Args:
        specs: The signature.
        shapes: Shape of each tensor by name.

    Raises:
        ExportError: A shape does not fit its spec, or one name stands for two sizes.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        shape = tuple(shapes[spec.name])
        if len(shape) != len(spec.shape):
            _refuse(spec.name, f"has shape {shape}", f"shape {spec.shape}")
        for said, size in zip(spec.shape, shape, strict=True):
            wanted = sizes.setdefault(said, size) if isinstance(said, str) else said
            if wanted != size:
                _refuse(spec.name, f"has shape {shape}", f"shape {spec.shape} with {said} {wanted}")
    return sizes


def check_coverage(example: Mapping[str, int], cases: Sequence[Mapping[str, int]]) -> None:
    """Refuse a claim that nothing would prove: a dimension that never differs from the example.

    Args:
        example: Sizes of the batch that formats are exported with.
        cases: Sizes of each golden batch.

    Raises:
        ExportError: There is no golden batch, or all have the example's size somewhere.
    """
    if not cases:
        raise ExportError(build_message("golden batches", "there are none", "two or more"))
    if example.get(BATCH, 2) < 2:
        found = f"has {example[BATCH]} sample"
        raise ExportError(build_message("example batch", found, "at least two", _TO_CASES))
    for name, size in example.items():
        if all(case[name] == size for case in cases):
            found = f"dimension {name!r} is {size} in all of them, as in the example"
            action = f"Add a batch of another size, or fix it in task.inputs: {size}."
            raise ExportError(build_message("golden batches", found, "another size", action))


def read_output_specs(
    cases: Sequence[GoldenCase], sizes: Sequence[Mapping[str, int]]
) -> tuple[TensorSpec, ...]:
    """Describe the outputs by how their sizes go with those of the inputs.

    Args:
        cases: The golden cases.
        sizes: Size of each varying dimension, for each case.

    Raises:
        ExportError: The model's outputs change their names or number of dimensions.
    """
    names = {tuple(size[name] for size in sizes): name for name in sizes[0]}
    specs = []
    for name, first in cases[0].outputs.items():
        for case in cases:
            if list(case.outputs) != list(cases[0].outputs):
                _refuse(name, "is not returned for every batch", kind="output")
            if case.outputs[name].ndim != first.ndim:
                _refuse(name, "changes its number of dimensions", kind="output")
        shape: list[int | str] = []
        for axis in range(first.ndim):
            found = tuple(case.outputs[name].shape[axis] for case in cases)
            is_fixed = len(set(found)) == 1 and found[0] > 0
            shape.append(names.get(found) or (found[0] if is_fixed else f"{name}_{axis}"))
        dtype = _check_dtype(name, str(first.dtype), "output")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(shape)))
    return tuple(specs)


def _dtype_name(name: str, tensor: Tensor) -> DType:
    return _check_dtype(name, str(tensor.dtype).removeprefix("torch."), "input")


def _check_dtype(name: str, text: str, kind: str) -> DType:
    known: dict[str, DType] = {d: d for d in get_args(DType) if d != "bfloat16"}  # arrays have none
    if text not in known:
        _refuse(name, f"is {text}", f"one of {', '.join(known)}", kind)
    return known[text]


def _refuse(name: str, found: str, expected: str = "", kind: str = "input") -> NoReturn:
    raise ExportError(build_message(f"{kind} {name!r}", found, expected, _TO_CASES))
