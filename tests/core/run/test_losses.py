from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail import TaskSpec
from dovetail.errors import ConfigError, DataError, ModelError
from dovetail.run.losses import (
    Objective,
    UserLoss,
    build_objective,
    check_additive,
    perplexity,
)
from dovetail.run.targets import IGNORE_INDEX, count_items

Kind = str


def objective_of(kind: Kind, loss: str = "task", **fields: Any) -> Objective:
    return build_objective(TaskSpec(kind=kind, **fields), loss)  # type: ignore[arg-type]


def loss_of(kind: Kind, outputs: Any, labels: Tensor) -> tuple[Tensor, Any]:
    return objective_of(kind).loss(outputs, {"labels": labels})


def metrics_of(kind: Kind, outputs: Any, labels: Tensor) -> dict[str, float]:
    found = objective_of(kind).metrics(outputs, {"labels": labels})
    return {name: float(value) for name, value in found.items()}


@pytest.fixture
def numbers() -> Callable[..., Tensor]:
    """Normal numbers of any shape, in double precision, the same in every test."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


Numbers = Callable[..., Tensor]


# --- values, against torch's own formulas in double precision


def test_classification_is_cross_entropy_over_samples(numbers: Numbers) -> None:
    logits, labels = numbers(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss, items = loss_of("classification", logits, labels)
    assert loss.dtype is torch.float64
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
    assert items == 5


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5)])
def test_classification_leaves_ignored_targets_out_of_loss_items_and_accuracy(
    numbers: Numbers, shape: tuple[int, ...]
) -> None:
    logits = numbers(*shape)
    labels = logits.argmax(1)
    labels[0] = IGNORE_INDEX
    loss, items = loss_of("classification", logits, labels)
    kept = labels != IGNORE_INDEX
    logs = logits.log_softmax(1).movedim(1, -1)[kept]
    expected = -logs.gather(1, labels[kept].unsqueeze(1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert items == int(kept.sum())
    assert metrics_of("classification", logits, labels) == {"accuracy": 1.0}


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)])
def test_classification_takes_soft_labels(numbers: Numbers, shape: tuple[int, ...]) -> None:
    logits, labels = numbers(*shape), numbers(*shape).softmax(1)
    loss, items = loss_of("classification", logits, labels)
    expected = -(labels * logits.log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert items == shape[0] * math.prod(shape[2:])
    accuracy = (logits.argmax(1) == labels.argmax(1)).double().mean()
    assert metrics_of("classification", logits, labels)["accuracy"] == pytest.approx(
        float(accuracy)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_soft_labels_of_any_precision_fit_a_model_in_single_precision(
    numbers: Numbers, dtype: torch.dtype
) -> None:
    logits = numbers(5, 3).float().requires_grad_()
    loss, _ = loss_of("classification", logits, numbers(5, 3).softmax(1).to(dtype))
    loss.backward()
    assert loss.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_class_labels_of_any_integer_type_are_taken(numbers: Numbers, dtype: torch.dtype) -> None:
    logits, labels = numbers(4, 3), torch.tensor([0, 1, 2, 1])
    loss, items = loss_of("classification", logits, labels.to(dtype))
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert items == 4


def test_multilabel_is_binary_cross_entropy_over_samples(numbers: Numbers) -> None:
    logits, labels = numbers(4, 3), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    loss, items = loss_of("multilabel", logits, labels)
    p = logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert items == 4
    right = ((p > 0.5) == labels.bool()).double().mean()
    assert metrics_of("multilabel", logits, labels)["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("outputs_shape", "labels_shape"),
    [((4,), (4,)), ((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 2))],
)
def test_regression_is_the_mean_square_and_never_broadcasts(
    numbers: Numbers, outputs_shape: tuple[int, ...], labels_shape: tuple[int, ...]
) -> None:
    outputs, labels = numbers(*outputs_shape), numbers(*labels_shape)
    loss, items = loss_of("regression", outputs, labels)
    difference = outputs.reshape(-1) - labels.reshape(-1)
    assert float(loss) == pytest.approx(float((difference**2).mean()), rel=1e-12)
    assert items == 4
    mae = float(difference.abs().mean())
    assert metrics_of("regression", outputs, labels)["mae"] == pytest.approx(mae)


def test_regression_takes_integer_targets_and_those_of_another_precision(numbers: Numbers) -> None:
    outputs = numbers(3).float().requires_grad_()
    for labels in (torch.tensor([1, 2, 3]), numbers(3), numbers(3).half()):
        loss, _ = loss_of("regression", outputs, labels)
        assert loss.dtype is torch.float32


def token_loss_by_hand(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if wanted != IGNORE_INDEX:
            total = total - row.log_softmax(0)[wanted]
            count += 1
    return total / max(count, 1), count


@pytest.fixture
def tokens(numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Logits `(2, 5, 7)` and labels `(2, 5)`, padded with ignored targets."""
    labels = torch.tensor([[3, 1, 6, IGNORE_INDEX, IGNORE_INDEX], [0, 2, 2, 5, IGNORE_INDEX]])
    return numbers(2, 5, 7), labels


@pytest.mark.parametrize("kind", ["masked_lm", "seq2seq"])
def test_token_loss_is_the_mean_over_kept_targets(
    kind: Kind, tokens: tuple[Tensor, Tensor]
) -> None:
    logits, labels = tokens
    loss, items = loss_of(kind, logits, labels)
    expected, count = token_loss_by_hand(logits, labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(items) == count == 7


def test_causal_loss_lets_each_position_predict_the_next_token(
    tokens: tuple[Tensor, Tensor],
) -> None:
    logits, labels = tokens
    loss, items = loss_of("causal_lm", logits, labels)
    expected, count = token_loss_by_hand(logits[:, :-1], labels[:, 1:])
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(items) == count == 5


def test_causal_accuracy_is_shifted_too() -> None:
    labels = torch.tensor([[1, 2, 3, IGNORE_INDEX]])
    logits = F.one_hot(torch.tensor([[2, 3, 0, 0]]), 4).double()
    assert metrics_of("causal_lm", logits, labels) == {"accuracy": 1.0}
    assert metrics_of("masked_lm", logits, labels) == {"accuracy": 0.0}


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq", "classification"])
def test_a_batch_without_a_target_has_loss_zero_weight_zero_and_a_finite_gradient(
    kind: Kind, numbers: Numbers
) -> None:
    shape = (4, 3) if kind == "classification" else (2, 5, 7)
    logits = numbers(*shape).requires_grad_()
    labels = torch.full(shape[:1] if kind == "classification" else shape[:2], IGNORE_INDEX)
    loss, items = loss_of(kind, logits, labels)
    loss.backward()
    assert float(loss.detach()) == 0
    assert int(items) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert metrics_of(kind, logits, labels) == {"accuracy": 0.0}


def test_a_causal_sequence_of_one_token_has_nothing_to_predict(numbers: Numbers) -> None:
    logits = numbers(2, 1, 7).requires_grad_()
    loss, items = loss_of("causal_lm", logits, torch.tensor([[1], [2]]))
    loss.backward()
    assert (float(loss.detach()), int(items)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_single_precision_at_least(
    numbers: Numbers, dtype: torch.dtype
) -> None:
    logits = numbers(4, 3).to(dtype)
    labels = torch.tensor([0, 1, 2, 0])
    loss, _ = loss_of("classification", logits, labels)
    assert torch.equal(loss, F.cross_entropy(logits.float(), labels))


def split(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, count - 1), max_size=4, unique=True).map(sorted)


@settings(max_examples=25)
@given(cuts=split(8), data=st.data())
@pytest.mark.parametrize(
    "kind", ["classification", "soft", "multilabel", "regression", "causal_lm"]
)
def test_losses_of_parts_weighted_by_their_items_are_the_loss_of_the_whole(
    kind: Kind, cuts: list[int], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 5, (8, 6), generator=generator)
    labels[labels < 0] = IGNORE_INDEX
    if kind in ("classification", "soft"):
        logits = logits.movedim(2, 1)
    if kind == "soft":
        labels, kind = torch.randn(8, 5, 6, generator=generator).softmax(1), "classification"
    if kind == "multilabel":
        labels = (logits > 0.3).long()
    if kind == "regression":
        labels = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64)
    edges = [0, *cuts, 8]
    parts = [loss_of(kind, logits[a:b], labels[a:b]) for a, b in itertools.pairwise(edges)]
    whole, items = loss_of(kind, logits, labels)
    assert sum(int(n) for _, n in parts) == int(items)
    mean = sum(float(loss) * int(n) for loss, n in parts) / max(int(items), 1)
    assert mean == pytest.approx(float(whole), rel=1e-12)


# --- what outputs may be


def test_loss_reads_the_logits_of_any_output(numbers: Numbers) -> None:
    logits, labels = numbers(4, 3), torch.tensor([0, 1, 2, 0])
    expected = loss_of("classification", logits, labels)[0]
    for outputs in ((logits, numbers(2)), [logits], {"aux": numbers(4, 9), "logits": logits}):
        assert torch.equal(loss_of("classification", outputs, labels)[0], expected)
        assert metrics_of("classification", outputs, labels)


def test_model_loss_is_the_one_the_model_returns(numbers: Numbers) -> None:
    objective = objective_of("causal_lm", "model")
    labels = torch.tensor([[1, 2, IGNORE_INDEX]])
    outputs = {"loss": torch.tensor(2.5), "logits": numbers(1, 3, 4)}
    loss, items = objective.loss(outputs, {"labels": labels})
    assert loss is outputs["loss"]
    assert int(items) == 1
    assert objective.needs_labels_in_model
    assert objective.has_perplexity


def test_model_loss_reads_a_transformers_output(numbers: Numbers) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    labels = torch.tensor([[3, 1, 6, 2], [5, 4, IGNORE_INDEX, IGNORE_INDEX]])
    made = outputs.CausalLMOutput(loss=torch.tensor(2.5), logits=numbers(2, 4, 7))
    assert objective_of("causal_lm", "model").loss(made, {"labels": labels}) == (made.loss, 4)
    by_hand, _ = token_loss_by_hand(made.logits[:, :-1], labels[:, 1:])
    assert float(loss_of("causal_lm", made, labels)[0]) == pytest.approx(float(by_hand))


@pytest.mark.parametrize("outputs", [torch.zeros(2), (torch.zeros(()),), {"loss": 3.0}, {}])
def test_model_loss_says_when_the_model_returns_none(outputs: Any) -> None:
    with pytest.raises(ModelError, match=r"without a tensor 'loss'.*set train.loss = \"task\""):
        objective_of("classification", "model").loss(outputs, {"labels": torch.zeros(2).long()})


def test_model_loss_refuses_a_loss_per_sample() -> None:
    with pytest.raises(ModelError, match=r"returned a Tensor of shape \(2,\); expected a scalar"):
        objective_of("classification", "model").loss(
            {"loss": torch.zeros(2)}, {"labels": torch.zeros(2).long()}
        )


# --- a loss of the user's


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config file's folder with a module of loss functions."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_losses.py").write_text(
        "def l1(outputs, batch): return (outputs - batch['y']).abs().mean()\nNUMBER = 3\n"
    )
    yield tmp_path
    sys.modules.pop("own_losses", None)


def test_user_loss_is_imported_and_counts_samples(folder: Path) -> None:
    objective = build_objective(TaskSpec(), "own_losses:l1", folder)
    batch = {"x": torch.zeros(3, 2), "y": torch.ones(3)}
    loss, items = objective.loss(torch.zeros(3), batch)
    assert (float(loss), items) == (1.0, 3)
    assert objective.metrics(torch.zeros(3), batch) == {}
    assert not objective.needs_labels_in_model
    assert not objective.has_perplexity


def test_user_loss_that_compares_items_is_refused_with_windows(tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(
        "def contrast(outputs, batch): return outputs.sum()\ncontrast.is_additive = False\n"
    )
    objective = build_objective(TaskSpec(), "pairs:contrast", tmp_path)
    assert not objective.is_additive
    check_additive(objective, 1)
    for steps, words in ((4, "4"), (None, "several")):
        with pytest.raises(ConfigError, match=f"is_additive = False: .* of {words} micro-batches"):
            check_additive(objective, steps)
    check_additive(objective_of("classification"), 4)


@pytest.mark.parametrize("path", ["own_losses:l2", "own_lossse:l1", "own_losses:NUMBER"])
def test_user_loss_that_is_no_function_is_refused_at_once(folder: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"^config train.loss: "):
        build_objective(TaskSpec(), path, folder)


@pytest.mark.parametrize("items", [5, 2.5, torch.tensor(5)])
def test_user_loss_may_count_its_items(items: Any) -> None:
    loss = UserLoss(lambda outputs, batch: (outputs.mean(), items))
    assert loss(torch.ones(3), {"x": torch.zeros(3)})[1] is items


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (3.0, "returned a float; expected a scalar tensor"),
        (torch.zeros(3), r"returned a Tensor of shape \(3,\); expected a scalar tensor"),
        (None, "returned a NoneType"),
        ({"loss": torch.tensor(1.0)}, "returned a dict"),
        ((torch.tensor(1.0),), "returned a tuple"),
        ((torch.tensor(1.0), 2, 3), "returned a tuple"),
        ((3.0, 4), "returned a float"),
        ((torch.tensor(1.0), "four"), "returned 'four' for the items; expected a number or a scal"),
        ((torch.tensor(1.0), torch.ones(2)), "for the items; expected a number or a scalar tensor"),
        ((torch.tensor(1.0), None), "returned None for the items"),
    ],
)
def test_user_loss_with_a_wrong_return_is_told(result: Any, shown: str) -> None:
    with pytest.raises(ModelError, match=rf"^config train.loss: .*{shown}"):
        UserLoss(lambda outputs, batch: result)(torch.ones(3), {"x": torch.zeros(3)})


# --- mistakes


@pytest.mark.parametrize("kind", ["classification", "causal_lm", "regression"])
def test_a_batch_without_labels_is_told_with_its_keys(kind: Kind) -> None:
    with pytest.raises(DataError, match=rf"has the keys x, y; expected 'labels' for {kind}"):
        objective_of(kind).loss(torch.zeros(2, 3), {"x": torch.zeros(2), "y": torch.zeros(2)})


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([0, 3], "labels: run from 0 to 3; expected 0 to 2, as the model has 3 outputs."),
        ([-1, 1], "labels: run from -1 to 1; expected 0 to 2"),
        ([-100, 7], "labels: run from 7 to 7; expected 0 to 2"),
    ],
)
def test_class_labels_out_of_range_are_told_with_their_range(labels: list[int], shown: str) -> None:
    with pytest.raises(DataError) as caught:
        loss_of("classification", torch.zeros(2, 3), torch.tensor(labels))
    assert str(caught.value).startswith(shown)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_token_labels_out_of_range_are_told_with_their_range(kind: Kind) -> None:
    with pytest.raises(
        DataError, match="labels: run from 1 to 9; expected 0 to 6, as the model has 7"
    ):
        loss_of(kind, torch.zeros(1, 3, 7), torch.tensor([[1, 9, 2]]))


@pytest.mark.parametrize(
    ("kind", "outputs", "labels"),
    [
        ("classification", torch.zeros(4, 3), torch.zeros(5).long()),
        ("classification", torch.zeros(4, 3), torch.zeros(4, 1).long()),
        ("classification", torch.zeros(4, 3), torch.zeros(4)),
        ("classification", torch.zeros(4, 3), torch.zeros(4, 2)),
        ("classification", torch.zeros(4), torch.zeros(4).long()),
        ("multilabel", torch.zeros(4, 3), torch.zeros(4)),
        ("multilabel", torch.zeros(4, 3), torch.zeros(1, 3)),
        ("regression", torch.zeros(4, 2), torch.zeros(4)),
        ("regression", torch.zeros(4, 1), torch.zeros(1, 4)),
        ("regression", torch.zeros(4), torch.zeros(1)),
        ("causal_lm", torch.zeros(2, 3, 7), torch.zeros(2, 4).long()),
        ("causal_lm", torch.zeros(2, 7), torch.zeros(2, 3).long()),
        ("masked_lm", torch.zeros(2, 3, 7), torch.zeros(3, 2).long()),
        ("seq2seq", torch.zeros(2, 3), torch.zeros(2, 3).long()),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_told_and_never_broadcast(
    kind: Kind, outputs: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ModelError) as caught:
        loss_of(kind, outputs, labels)
    message = str(caught.value)
    assert message.startswith(f"loss of {kind}: output {tuple(outputs.shape)}, labels ")
    assert str(tuple(labels.shape)) in message
    assert "; expected output" in message


def test_an_output_without_a_tensor_is_told() -> None:
    with pytest.raises(ModelError, match="model output: is a dict; expected a tensor"):
        loss_of("classification", {"text": "x"}, torch.zeros(2).long())


@pytest.mark.parametrize(
    ("kind", "labels", "count"),
    [
        ("classification", torch.zeros(4, 2).long(), 8),
        ("classification", torch.zeros(4).long() - 100, 0),
        ("classification", torch.zeros(4, 3, 2), 8),
        ("classification", torch.zeros(0).long(), 0),
        ("multilabel", torch.zeros(4, 9), 4),
        ("regression", torch.zeros(4, 2), 4),
        ("causal_lm", torch.tensor([[1, 2, -100]]), 1),
        ("seq2seq", torch.tensor([[1, 2, -100]]), 2),
    ],
)
def test_count_items_counts_what_the_mean_runs_over(kind: Any, labels: Tensor, count: int) -> None:
    assert int(count_items(kind, labels)) == count


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.0, 1.0), (1.0, math.e), (100.0, math.exp(100)), (math.inf, math.exp(100))],
)
def test_perplexity_is_bounded(loss: float, expected: float) -> None:
    assert perplexity(loss) == expected


def test_perplexity_of_nan_is_nan() -> None:
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
def test_only_language_has_a_perplexity(kind: Kind) -> None:
    assert objective_of(kind).has_perplexity
    assert not objective_of("classification").has_perplexity


@pytest.mark.parametrize("kind", ["loss", "accuracy"])
def test_causal_lm_is_the_same_on_whichever_side_rows_are_padded(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, width, vocabulary = (5, 2, 3), 5, 7
    rows = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    logits = [torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) for n in lengths]
    results = []
    for is_left in (False, True):
        labels = torch.full((3, width), -100)
        mask = torch.zeros(3, width, dtype=torch.int64)
        # What a model answers at padding is arbitrary, and must not matter.
        output = torch.randn(3, width, vocabulary, generator=generator, dtype=torch.float64)
        for index, (row, values) in enumerate(zip(rows, logits, strict=True)):
            place = slice(width - len(row), None) if is_left else slice(None, len(row))
            labels[index, place], mask[index, place], output[index, place] = row, 1, values
        objective = build_objective(TaskSpec(kind="causal_lm", modality="text"), "task")
        batch = {"labels": labels, "attention_mask": mask}
        loss, items = objective.loss(output, batch)
        assert int(items) == sum(n - 1 for n in lengths)
        results.append(loss if kind == "loss" else objective.metrics(output, batch)["accuracy"])
    right, left = map(float, results)
    assert right == pytest.approx(left, rel=1e-12)
