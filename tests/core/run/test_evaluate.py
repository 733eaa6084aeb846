from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail import TaskSpec
from dovetail.config import parse_config
from dovetail.run.evaluate import evaluate, evaluation_mode
from dovetail.run.loader import EpochLoader, build_loader
from dovetail.run.losses import Objective, build_objective, perplexity
from dovetail.run.targets import IGNORE_INDEX
from dovetail.signature import build_call


def stack(samples: Sequence[Any]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in samples[0]}


def loader_of(samples: list[dict[str, Any]], batch_size: int) -> EpochLoader:
    config, problems = parse_config({"train": {"batch_size": batch_size}})
    assert config is not None, problems
    return build_loader(samples, config, stack, torch.device("cpu"), is_training=False)


def bind_to(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Any]:
    return lambda batch: build_call(model, list(batch))


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"features": torch.randn(4, generator=generator, dtype=torch.float64), "labels": i % 3}
        for i in range(10)
    ]


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 3).double()


OBJECTIVE = build_objective(TaskSpec(), "task")


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 99])
def test_evaluate_is_the_mean_over_all_samples_whatever_the_batches(
    model: nn.Module, samples: list[dict[str, Any]], batch_size: int
) -> None:
    whole = stack(samples)
    with torch.no_grad():
        logits = model(whole["features"])
    found = evaluate(model, bind_to(model), loader_of(samples, batch_size), OBJECTIVE)
    loss = nn.functional.cross_entropy(logits, whole["labels"])
    accuracy = (logits.argmax(1) == whole["labels"]).double().mean()
    assert found == {
        "loss": pytest.approx(float(loss), rel=1e-12),
        "accuracy": pytest.approx(float(accuracy), rel=1e-6),
    }


class Unigram(nn.Module):
    """Logits of a language model that looks at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.1, 0.9, -0.3], dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits.expand(*features.shape, 3)


def token_samples(*rows: list[int]) -> list[dict[str, Any]]:
    return [{"features": row, "labels": row} for row in rows]


def test_evaluate_weights_language_by_tokens_and_reports_perplexity() -> None:
    rows = ([0, 1, 2], [2, 2, IGNORE_INDEX], [1, IGNORE_INDEX, IGNORE_INDEX])
    model = Unigram()
    objective = build_objective(TaskSpec(kind="causal_lm"), "task")
    found = evaluate(model, bind_to(model), loader_of(token_samples(*rows), 1), objective)
    logs = model.logits.detach().log_softmax(0)
    loss = -float(logs[[1, 2, 2]].mean())
    assert found == {
        "loss": pytest.approx(loss, rel=1e-12),
        "accuracy": pytest.approx(1 / 3),
        "perplexity": pytest.approx(perplexity(loss)),
    }


def test_evaluate_of_a_split_without_an_item_is_none() -> None:
    objective = build_objective(TaskSpec(kind="causal_lm"), "task")
    samples = token_samples([1, IGNORE_INDEX], [2, IGNORE_INDEX])
    model = Unigram()
    assert evaluate(model, bind_to(model), loader_of(samples, 1), objective) is None


def test_evaluate_stops_when_it_is_asked_to(
    model: nn.Module, samples: list[dict[str, Any]]
) -> None:
    answers = iter([False, False, True])
    found = evaluate(
        model,
        bind_to(model),
        loader_of(samples, 1),
        OBJECTIVE,
        should_stop=lambda: next(answers),
    )
    assert found is None


def test_evaluate_builds_no_graph_and_leaves_model_and_modes_as_they_were(
    samples: list[dict[str, Any]],
) -> None:
    seen: list[tuple[bool, bool]] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()
            self.norm = nn.BatchNorm1d(4).double()
            self.frozen = nn.Dropout(0.9).eval()

        def forward(self, features: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            logits: Tensor = self.linear(self.frozen(self.norm(features)))
            return logits

    model = Looking().train()
    model.frozen.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, bind_to(model), loader_of(samples, 5), OBJECTIVE)
    assert seen == [(False, False), (False, False)]
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_evaluation_mode_is_left_when_the_evaluation_fails() -> None:
    model = nn.Linear(1, 1).train()

    def fail() -> None:
        with evaluation_mode(model):
            assert not model.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.training


def test_evaluate_runs_the_transform_on_its_input(
    model: nn.Module, samples: list[dict[str, Any]]
) -> None:
    class Halve(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features / 2

    doubled = [{**s, "features": s["features"] * 2} for s in samples]
    found = evaluate(
        model,
        bind_to(model),
        loader_of(doubled, 4),
        OBJECTIVE,
        transform=("features", Halve()),
    )
    assert found == evaluate(model, bind_to(model), loader_of(samples, 4), OBJECTIVE)


def test_evaluate_runs_in_the_runs_precision(samples: list[dict[str, Any]]) -> None:
    kinds: list[torch.dtype] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = self.linear(features.float())
            kinds.append(logits.dtype)
            return logits

    model = Looking()
    evaluate(
        model,
        bind_to(model),
        loader_of(samples, 10),
        OBJECTIVE,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert kinds == [torch.bfloat16]


def test_evaluate_takes_losses_whose_items_are_tensors(
    model: nn.Module, samples: list[dict[str, Any]]
) -> None:
    objective = Objective(
        lambda outputs, batch: (outputs.mean(), torch.tensor(len(batch["labels"]))),
        lambda outputs, batch: {},
    )
    found = evaluate(model, bind_to(model), loader_of(samples, 3), objective)
    with torch.no_grad():
        expected = float(model(stack(samples)["features"]).mean())
    assert found == {"loss": pytest.approx(expected, rel=1e-12)}
