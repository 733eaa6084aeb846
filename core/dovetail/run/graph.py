"""The graph of a model, for people to look at: which operator works on what."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dovetail.errors import build_message
from dovetail.run.checkpoint import random_state, set_random_state
from dovetail.run.evaluate import evaluation_mode
from dovetail.run.naming import Batch
from dovetail.signature import bind_inputs, unwrap

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

GRAPH = "graph.json"
"""Name of the file in a run's folder."""


def try_write_graph(run_dir: Path, model: nn.Module, batch: Batch) -> Path | None:
    """Write `graph.json` into a run's folder; a model that cannot be traced costs a warning.

    Args:
        run_dir: The run's folder.
        model: Not compiled, or compiled in place; it is traced in evaluation mode.
        batch: Tensors by name on the model's device, labels included.

    Returns:
        The file: an object with `nodes`, see `trace_graph`. `None` if there is none.
    """
    path = run_dir / GRAPH
    try:
        nodes = trace_graph(model, batch)
        path.write_text(json.dumps({"nodes": nodes}), encoding="utf-8")
    except Exception as err:
        found = f"has no graph: {type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
        where = f"model {type(unwrap(model)).__name__}"
        warnings.warn(build_message(where, found, action="The run goes on."), stacklevel=2)
        return None
    return path


def trace_graph(model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """Trace a model once.

    Returns:
        A mapping per operator, parameter, input and output, each after those that it reads:
        `name`, under the path of its module and unique; `op`; `inputs`, names; `shape` and
        `dtype` of its tensor, where it is one.
    """
    names, by_keyword = bind_inputs(model, list(batch))
    inputs = {name: batch[name] for name in names}
    state = random_state()
    try:
        with evaluation_mode(model), torch.no_grad():
            program = torch.export.export(
                unwrap(model),
                () if by_keyword else tuple(inputs.values()),
                inputs if by_keyword else {},
                strict=False,
            )
    finally:
        set_random_state(state)
    return _list_nodes(program)


def _list_nodes(program: ExportedProgram) -> list[dict[str, Any]]:
    signature = program.graph_signature
    held: Mapping[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    names: dict[Node, str] = {}
    rows = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = held.get(node.name)
            op = "Input" if target is None else "Parameter"
            name = f"input/{node.name}" if target is None else target.replace(".", "/")
        elif node.op == "output":
            op, name = "Output", "output"
        else:
            op, name = str(node.target), f"{_scope_of(node)}{node.name}"
        names[node] = name
        reads = [names[read] for read in node.all_input_nodes]
        row: dict[str, Any] = {"name": name, "op": op, "inputs": reads}
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = [int(size) for size in value.shape]
            row |= {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
        rows.append(row)
    return rows


def _scope_of(node: Node) -> str:
    """Return the path of the module that an operator belongs to, "body/0/"."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return f"{path.replace('.', '/')}/" if path else ""
