from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dovetail import TaskSpec, TensorSpec

PRESETS = ["lm_tiny", "cls_tiny", "seq2seq_tiny", "vision_tiny"]

shapes = st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["batch", "time", "7"])), max_size=4)
tensors = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=8),
    dtype=st.sampled_from(["float32", "int64", "uint8"]),
    shape=shapes.map(tuple),
)
tasks = st.builds(
    TaskSpec,
    name=st.text(min_size=1, max_size=20),
    kind=st.sampled_from(["classification", "regression", "causal_lm"]),
    inputs=st.lists(tensors, max_size=3).map(tuple),
    num_classes=st.none() | st.integers(1, 1000),
    vocab_size=st.none() | st.integers(1, 10**6),
)


@given(tasks)
def test_task_spec_survives_json(task: TaskSpec) -> None:
    assert TaskSpec.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("preset", PRESETS)
def test_task_spec_presets_carry_their_names_and_round_trip(preset: str) -> None:
    task = getattr(TaskSpec, preset)()
    assert task.name == preset
    assert task.inputs[0].shape[0] == "batch"
    assert TaskSpec.from_dict(task.to_dict()) == task


def test_task_spec_is_frozen() -> None:
    task = TaskSpec()
    with pytest.raises(ValidationError, match="frozen"):
        task.name = "other"


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "classify"},
        {"modalty": "text"},
        {"name": ""},
        {"num_classes": 0},
        {"vocab_size": -1},
        {"inputs": [{"name": "x", "shape": [0]}]},
        {"inputs": [{"name": "x", "dtype": "float8"}]},
        {"inputs": [{"name": ""}]},
    ],
)
def test_task_spec_refuses_what_does_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TaskSpec.from_dict(fields)


def test_task_spec_refuses_labels_that_contradict_num_classes() -> None:
    with pytest.raises(ValidationError, match="num_classes is 3 but labels names 2 classes"):
        TaskSpec(labels=("cat", "dog"), num_classes=3)


@pytest.mark.parametrize(
    ("task", "count"),
    [
        (TaskSpec(), None),
        (TaskSpec(num_classes=4), 4),
        (TaskSpec(labels=("a", "b")), 2),
        (TaskSpec(labels=("a", "b"), num_classes=2), 2),
    ],
)
def test_class_count_comes_from_either_field(task: TaskSpec, count: int | None) -> None:
    assert task.class_count == count


def test_counts_tokens_only_for_language() -> None:
    kinds = {"classification", "multilabel", "regression", "causal_lm", "masked_lm", "seq2seq"}
    counted = {kind for kind in kinds if TaskSpec.from_dict({"kind": kind}).counts_tokens}
    assert counted == {"causal_lm", "masked_lm", "seq2seq"}


def test_every_field_has_help() -> None:
    for model in (TaskSpec, TensorSpec):
        assert all(field.description for field in model.model_fields.values())
