from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.errors import ModelError
from dovetail.signature import bind_inputs, build_call, name_outputs, primary_output, unwrap


class Echo(nn.Module):
    """Base of models that return what they were called with."""


class Positional(Echo):
    def forward(self, x: Tensor) -> Any:
        return {"x": x}


class Named(Echo):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class KeywordOnly(Echo):
    def forward(self, *, x: Tensor) -> Any:
        return {"x": x}


class Anything(Echo):
    def forward(self, **inputs: Tensor) -> Any:
        return inputs


class Starred(Echo):
    def forward(self, *inputs: Tensor) -> Any:
        return {"x": inputs}


class OwnLoss(Echo):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return {"input_ids": input_ids, "labels": labels}


class NeedsLabels(Echo):
    def forward(self, features: Tensor, labels: Tensor) -> Any:
        return {"features": features, "labels": labels}


class AllOptional(Echo):
    def forward(self, x: Tensor | None = None, mask: Tensor | None = None) -> Any:
        return {"x": x, "mask": mask}


@pytest.mark.parametrize(
    ("model", "names", "needs_labels", "bound"),
    [
        (Positional, ["features", "labels"], False, (("features",), False)),
        (Positional, ["x", "labels"], False, (("x",), True)),
        (Positional, ["x", "index", "labels"], False, (("x",), True)),
        (Positional, ["features", "labels"], True, (("features",), False)),
        (Named, ["input_ids", "labels"], False, (("input_ids",), True)),
        (
            Named,
            ["attention_mask", "input_ids", "labels"],
            False,
            (("attention_mask", "input_ids"), True),
        ),
        (KeywordOnly, ["x", "labels"], False, (("x",), True)),
        (Anything, ["a", "b", "labels"], False, (("a", "b"), True)),
        (Anything, ["a", "labels"], True, (("a", "labels"), True)),
        (Starred, ["features", "labels"], False, (("features",), False)),
        (OwnLoss, ["input_ids", "labels"], False, (("input_ids",), True)),
        (OwnLoss, ["input_ids", "labels"], True, (("input_ids", "labels"), True)),
        (OwnLoss, ["input_ids"], True, (("input_ids",), True)),
        (Named, ["input_ids", "labels"], True, (("input_ids",), True)),
        (NeedsLabels, ["features", "labels"], False, (("features", "labels"), True)),
        (AllOptional, ["features"], False, (("features",), False)),
    ],
)
def test_bind_inputs_chooses_by_name_and_falls_back_to_the_only_input(
    model: Callable[[], nn.Module], names: list[str], needs_labels: bool, bound: tuple[Any, bool]
) -> None:
    assert bind_inputs(model(), names, needs_labels=needs_labels) == bound


@pytest.mark.parametrize(
    ("model", "names", "shown"),
    [
        (Positional, ["pixels", "index", "labels"], "requires x; expected parameters named like"),
        (Named, ["tokens", "mask"], "requires input_ids"),
        (KeywordOnly, ["features"], "requires x"),
        (NeedsLabels, ["features"], "requires labels"),
        (AllOptional, ["a", "b"], "requires no input of the batch"),
    ],
)
def test_bind_inputs_says_what_forward_requires(
    model: Callable[[], nn.Module], names: list[str], shown: str
) -> None:
    with pytest.raises(ModelError) as caught:
        bind_inputs(model(), names)
    message = str(caught.value)
    assert message.startswith(f"model {model.__name__}.forward: ")
    assert shown in message
    assert ", ".join(names) in message


@pytest.mark.parametrize(
    ("model", "names", "called_with"),
    [
        (Positional, ["features", "labels"], {"x": "features"}),
        (Positional, ["x", "labels"], {"x": "x"}),
        (
            Named,
            ["attention_mask", "input_ids", "labels"],
            {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        ),
        (NeedsLabels, ["labels", "features"], {"features": "features", "labels": "labels"}),
    ],
)
def test_build_call_passes_each_tensor_to_its_parameter(
    model: Callable[[], nn.Module], names: list[str], called_with: dict[str, str]
) -> None:
    batch = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    seen = build_call(model(), names)(batch)
    assert {name: value for name, value in seen.items() if value is not None} == {
        parameter: batch[name] for parameter, name in called_with.items()
    }


class Wrapped(nn.Module):
    """Holds a module as `torch.compile` does, and counts the calls that go through it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner
        self.num_calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return self._orig_mod(*args, **kwargs)


def test_build_call_calls_the_wrapper_and_reads_the_signature_inside() -> None:
    wrapped = Wrapped(NeedsLabels())
    batch = {"features": A, "index": A, "labels": B}
    assert build_call(wrapped, list(batch))(batch) == {"features": A, "labels": B}
    assert wrapped.num_calls == 1


def test_unwrap_goes_through_nested_wrappers_and_leaves_a_users_module_alone() -> None:
    inner = nn.Linear(1, 1)
    assert unwrap(nn.DataParallel(Wrapped(inner))) is inner
    assert unwrap(inner) is inner

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = inner

    mine = Mine()
    assert unwrap(mine) is mine


A, B = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        (A, {"logits": A}),
        ((A, B), {"logits": A, "output_1": B}),
        ([A], {"logits": A}),
        ((None, A, "text", B), {"logits": A, "output_1": B}),
        (namedtuple("Out", "first second")(A, B), {"logits": A, "output_1": B}),
        ({"boxes": B, "logits": A}, {"logits": A, "boxes": B}),
        ({"scores": A, "boxes": B}, {"scores": A, "boxes": B}),
        ({"loss": B, "logits": A, "hidden_states": (B,)}, {"logits": A}),
        (OrderedDict(past_key_values=B, logits=A, attentions=B), {"logits": A}),
    ],
)  # fmt: skip
def test_name_outputs_puts_the_one_for_the_loss_first(outputs: Any, named: Any) -> None:
    found = name_outputs(outputs)
    assert list(found) == list(named)
    assert all(found[name] is tensor for name, tensor in named.items())
    assert primary_output(outputs) is next(iter(named.values()))


@pytest.mark.parametrize(
    "outputs",
    [None, 3.0, (), {}, [None], {"loss": A}, {"text": "x"}, SimpleNamespace(logits=A)],
)
def test_name_outputs_refuses_what_holds_no_tensor(outputs: Any) -> None:
    with pytest.raises(ModelError, match=rf"model output: is a {type(outputs).__name__}; expected"):
        name_outputs(outputs)


def test_name_outputs_reads_a_transformers_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    made = outputs.SequenceClassifierOutput(loss=B, logits=A, hidden_states=(B, B))
    assert name_outputs(made) == {"logits": A}
    assert primary_output(made) is A
