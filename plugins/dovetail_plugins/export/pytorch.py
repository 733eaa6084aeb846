"""PyTorch: safetensors weights, and a recipe that rebuilds the model."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from dovetail import PluginOptions, __version__, hookimpl
from dovetail.bundle.redaction import is_absolute
from dovetail.bundle.served import ServedModel
from dovetail.errors import BundleError, ExportError, build_message
from dovetail.imports import import_object
from dovetail.types import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from dovetail.types import Array, ExportInputs, Recipe, Runner

dovetail_api = 1

_WEIGHTS = "model.safetensors"
_MODEL = "model.json"
_SOURCE = "pytorch_source"


class Options(PluginOptions):
    """The PyTorch exporter has no options."""


@dataclass(frozen=True)
class _Part:
    """How one module is rebuilt."""

    factory: str
    kwargs: Mapping[str, Any]


class PytorchExporter:
    """Writes `model.safetensors`, `model.json` and, for a model of the user's own, its source."""

    @property
    def requirements(self) -> tuple[str, ...]:
        """PyTorch, safetensors, and dovetail to put them together."""
        return (f"dovetail>={__version__}", "numpy>=1.26", "safetensors>=0.4.5", "torch>=2.7")

    @property
    def carries_code(self) -> bool:
        """The source that builds the model lies in the artifact and is executed."""
        return True

    def export(self, model: nn.Module, inputs: ExportInputs, directory: Path) -> Artifact:
        """Write the weights under the model's own keys, and how the model is built.

        Args:
            model: In eval mode on the CPU, with the submodules `transform` and `model`.
            inputs: Example batch, signature and recipe.
            directory: Folder to write into.

        Raises:
            ExportError: The model was not made from an import path, what it was made with means
                nothing on another machine, or its state holds more than tensors.
        """
        recipe = inputs.recipe
        if recipe is None:
            action = 'Give an import path: [model] factory = "package.module:function".'
            found = "the model was passed as an object"
            expected = "a factory that another process can call"
            raise ExportError(build_message("config model.factory", found, expected, action))
        trained, transform = model.get_submodule("model"), model.get_submodule("transform")
        parts = {"model": _describe_recipe(recipe), "transform": _describe_transform(transform)}
        weights, aliases = _split_state(trained)
        modules = _copy_sources(recipe, parts, directory / _SOURCE)
        _save(weights, directory / _WEIGHTS)
        described = {
            "model": asdict(parts["model"]) if parts["model"] else None,
            "transform": asdict(parts["transform"]) if parts["transform"] else None,
            "inputs": [spec.name for spec in inputs.specs],
            "outputs": list(inputs.output_names),
            "aliases": aliases,
            "source_modules": modules,
        }
        text = _to_json(described)
        (directory / _MODEL).write_text(text, encoding="utf-8", newline="\n")
        files = tuple(sorted(p for p in directory.rglob("*") if p.is_file()))
        return Artifact("pytorch", directory / _MODEL, files, {"weights": _WEIGHTS})

    def load(self, path: Path) -> Runner:
        """Rebuild the model, strictly, and return it as a function of arrays.

        The source beside `path` is executed.

        Args:
            path: `model.json`.

        Raises:
            BundleError: The model that is rebuilt does not have the weights' keys and shapes.
            ConfigError: Its factory does not import or does not take the arguments.
        """
        described = json.loads(path.read_text(encoding="utf-8"))
        with _importable(path.parent / _SOURCE, described["source_modules"]):
            trained = _build(described["model"], "model")
            transform = described["transform"] and _build(described["transform"], "transform")
        _load_state(trained, path.parent / _WEIGHTS, described["aliases"])
        served = ServedModel(trained, described["inputs"], transform).eval()
        # The fused encoder path would write zeros at padding, where every other format, and the
        # model as it was proven, write numbers.
        torch.backends.mha.set_fastpath_enabled(False)

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with torch.no_grad():
                tensors = [torch.tensor(inputs[name]) for name in served.input_names]
                return {n: v.numpy() for n, v in served.named_forward(*tensors).items()}

        return run


def _describe_recipe(recipe: Recipe) -> _Part:
    return _Part(recipe.factory, _check_kwargs(recipe.kwargs, "config model.kwargs"))


def _describe_transform(transform: nn.Module) -> _Part | None:
    if isinstance(transform, nn.Identity):
        return None
    kind = type(transform)
    where = f"transform {kind.__name__}"
    if "<" in kind.__qualname__ or kind.__module__ == "__main__":
        found = f"is defined in {kind.__module__}.{kind.__qualname__}"
        _refuse(where, found, "a class at the top of a module")
    config = getattr(transform, "config", None)
    if not isinstance(config, Mapping):
        _refuse(where, f"has config {config!r}", "the keyword arguments that make it again")
    return _Part(f"{kind.__module__}:{kind.__qualname__}", _check_kwargs(config, f"{where}.config"))


def _check_kwargs(kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(kwargs), allow_nan=False))
    except (TypeError, ValueError) as err:
        found = f"cannot be written as JSON ({err})"
        action = "Give the factory numbers, strings, lists and tables."
        raise ExportError(build_message(where, found, "plain values", action)) from err
    for key, value in _leaves(plain):
        if isinstance(value, str) and is_absolute(value):
            expected = "values that mean the same on every machine"
            _refuse(f"{where}.{key}", "is an absolute path", expected)
    return plain


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield key, value
        return
    for name, item in items:
        yield from _leaves(item, f"{key}.{name}" if key else name)


def _split_state(trained: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state without tied tensors, and for each of those the key that holds it."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for key, value in trained.state_dict().items():
        if not isinstance(value, torch.Tensor):
            expected = "a state of tensors alone"
            _refuse(f"model state {key!r}", f"is a {type(value).__name__}", expected)
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            aliases[key] = seen[place]
            continue
        seen[place] = key
        weights[key] = value
    return weights, aliases


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    storages: dict[int, int] = {}
    for value in weights.values():
        pointer = value.untyped_storage().data_ptr()
        storages[pointer] = storages.get(pointer, 0) + 1
    own = {  # views of one storage are no ties; a file holds each of them whole
        key: value.clone(memory_format=torch.contiguous_format)
        if storages[value.untyped_storage().data_ptr()] > 1 or not value.is_contiguous()
        else value
        for key, value in weights.items()
    }
    save_file(own, path)


def _load_state(trained: nn.Module, path: Path, aliases: Mapping[str, str]) -> None:
    from safetensors.torch import load_file

    state = load_file(path)
    state |= {alias: state[key] for alias, key in aliases.items()}
    try:
        trained.load_state_dict(state, strict=True)
    except RuntimeError as err:
        found = f"the rebuilt model does not fit the weights ({err})"
        action = "Make the factory build the same model from the same arguments."
        raise BundleError(
            build_message(path.name, found, "the same keys and shapes", action)
        ) from err


def _build(part: Mapping[str, Any], where: str) -> nn.Module:
    factory = import_object(part["factory"], where=f"{_MODEL} {where}.factory")
    built = factory(**part["kwargs"])
    if not isinstance(built, nn.Module):
        found = f"{part['factory']} returned a {type(built).__name__}"
        raise BundleError(build_message(f"{_MODEL} {where}", found, "a torch.nn.Module"))
    return built


def _copy_sources(recipe: Recipe, parts: Mapping[str, _Part | None], target: Path) -> list[str]:
    """Copy the user's own modules that building the model imports; return their names."""
    if recipe.source_dir is None:
        return []
    waiting = [part.factory.partition(":")[0].partition(".")[0] for part in parts.values() if part]
    copied: list[str] = []
    while waiting:
        name = waiting.pop()
        sources = _find_sources(recipe.source_dir, name)
        if name in copied or not sources:
            continue
        copied.append(name)
        for source in sources:
            place = target / source.relative_to(recipe.source_dir)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            waiting += _imported_names(source)
    return sorted(copied)


def _find_sources(folder: Path, name: str) -> list[Path]:
    package = folder / name
    if (package / "__init__.py").is_file():
        return sorted(package.rglob("*.py"))
    module = folder / f"{name}.py"
    return [module] if module.is_file() else []


def _imported_names(source: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
    return [name.partition(".")[0] for name in names]


@contextlib.contextmanager
def _importable(folder: Path, names: list[str]) -> Iterator[None]:
    """Import `names` from `folder`, and give back what a process had under those names."""
    if not names:
        yield
        return
    is_ours = {m: m.partition(".")[0] in names for m in sys.modules}
    before = {m: sys.modules.pop(m) for m, ours in is_ours.items() if ours}
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes_bytecode
        sys.modules.update(before)


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    raise ExportError(build_message(where, found, expected))


@hookimpl
def dovetail_export(options: Options) -> PytorchExporter:
    """Make the exporter."""
    return PytorchExporter()
