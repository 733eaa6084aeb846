"""The graph of a model: whole, in order, under the paths of its modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dovetail.run.graph import trace_graph, try_write_graph


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(features)), "features": features * 2}


BATCH = {"features": torch.randn(4, 6), "labels": torch.zeros(4, dtype=torch.int64)}


def test_graph_has_every_operator_after_what_it_reads() -> None:
    rows = trace_graph(Small(), BATCH)
    seen: set[str] = set()
    for row in rows:
        assert set(row["inputs"]) <= seen
        seen.add(row["name"])
    assert len(seen) == len(rows)
    (first,) = [r for r in rows if r["name"] == "body/0/linear"]
    assert first["inputs"] == ["input/features", "body/0/weight", "body/0/bias"]
    assert (first["shape"], first["dtype"]) == ([4, 8], "float32")
    assert {r["name"]: r["op"] for r in rows}["body/0/weight"] == "Parameter"
    assert len(rows[-1]["inputs"]) == 2
    assert (rows[-1]["name"], rows[-1]["op"]) == ("output", "Output")


def test_graph_leaves_no_trace_in_model_and_random_numbers() -> None:
    model = Small()
    model.body.eval()
    before = torch.get_rng_state()
    trace_graph(model, BATCH)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model.body.training, model.head.training) == (True, False, True)


def test_graph_that_is_drawn_is_a_file(tmp_path: Path) -> None:
    path = try_write_graph(tmp_path, nn.Linear(6, 2), {"x": torch.randn(4, 6)})
    assert path == tmp_path / "graph.json"
    assert [row["op"] for row in json.loads(path.read_text())["nodes"]][-1] == "Output"


def test_model_that_cannot_be_traced_costs_one_warning(tmp_path: Path) -> None:
    class Choosy(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features if features.sum().item() > 0 else -features

    with pytest.warns(
        UserWarning, match=r"model Choosy: has no graph: .*\. The run goes on"
    ) as told:
        assert try_write_graph(tmp_path, Choosy(), BATCH) is None
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert not list(tmp_path.iterdir())
