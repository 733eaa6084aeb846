from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dovetail.config import TrainConfig
from dovetail.errors import ConfigError
from dovetail.run.schedule import LearningRate, build_factor, build_optimizer


class Network(nn.Module):
    """A matrix, a norm and a bias; the embedding is frozen and the head tied to the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.linear.weight


@pytest.fixture
def network() -> Network:
    return Network()


# --- the optimizer


def test_decay_goes_to_matrices_and_not_to_biases_and_norms(network: Network) -> None:
    optimizer = build_optimizer(network, TrainConfig(weight_decay=0.3))
    decay, rest = optimizer.param_groups
    assert [id(p) for p in decay["params"]] == [id(network.linear.weight)]
    assert {id(p) for p in rest["params"]} == {
        id(network.linear.bias),
        id(network.norm.weight),
        id(network.norm.bias),
    }
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("model", [nn.Linear(2, 2, bias=False), nn.LayerNorm(2)])
def test_a_model_of_one_sort_of_parameters_has_one_group(model: nn.Module) -> None:
    assert len(build_optimizer(model, TrainConfig()).param_groups) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", "AdamW"), ("sgd", "SGD"), ("torch.optim:RMSprop", "RMSprop")],
)
def test_optimizer_is_built_by_name_or_import_path(network: Network, name: str, kind: str) -> None:
    optimizer = build_optimizer(network, TrainConfig(optimizer=name, lr=0.5))
    assert type(optimizer).__name__ == kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_optimizer_kwargs_reach_the_optimizer(network: Network) -> None:
    config = TrainConfig(optimizer="sgd", optimizer_kwargs={"momentum": 0.9, "nesterov": True})
    group = build_optimizer(network, config).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_optimizer_takes_lists_as_a_file_holds_them(network: Network) -> None:
    optimizer = build_optimizer(network, TrainConfig(optimizer_kwargs={"betas": [0.8, 0.9]}))
    network.linear(torch.ones(4)).sum().backward()
    optimizer.step()
    assert list(optimizer.param_groups[0]["betas"]) == [0.8, 0.9]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config file's folder with an optimizer of the user's own."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    source = "import torch\nclass Mine(torch.optim.SGD): ...\ndef make(params, lr): ...\n"
    (tmp_path / "own_optimizers.py").write_text(source)
    yield tmp_path
    sys.modules.pop("own_optimizers", None)


def test_optimizer_of_the_user_is_found_beside_the_config(network: Network, folder: Path) -> None:
    optimizer = build_optimizer(network, TrainConfig(optimizer="own_optimizers:Mine"), folder)
    assert type(optimizer).__name__ == "Mine"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("own_optimizers:make", "expected a subclass of torch.optim.Optimizer"),
        ("torch.nn:Linear", "expected a subclass of torch.optim.Optimizer"),
        ("torch.optim:AdmaW", "Did you mean 'AdamW'?"),
    ],
)
def test_optimizer_that_is_none_is_refused(
    network: Network, folder: Path, path: str, shown: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(network, TrainConfig(optimizer=path), folder)
    assert str(caught.value).startswith("config train.optimizer: ")
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "shown"),
    [
        ("adamw", {"bta": 1}, "AdamW does not take"),
        ("adamw", {"betas": [2, 2]}, "Invalid beta parameter"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires"),
        ("adamw", {"foreach": True, "fused": True}, "AdamW does not take"),
        ("torch.optim:LBFGS", {}, "doesn't support per-parameter options"),
    ],
)
def test_arguments_an_optimizer_does_not_take_are_told(
    network: Network, name: str, kwargs: dict[str, Any], shown: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(network, TrainConfig(optimizer=name, optimizer_kwargs=kwargs))
    assert str(caught.value).startswith("config train.optimizer_kwargs: ")
    assert shown in str(caught.value)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_arguments_with_a_field_of_their_own_are_refused(network: Network, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer_kwargs.{name}: got 0.5.*Write it as train"):
        build_optimizer(network, TrainConfig(optimizer_kwargs={name: 0.5}))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="has no parameter that requires a gradient"):
        build_optimizer(model, TrainConfig())


# --- the course of the learning rate

ratios = st.floats(0, 1, exclude_max=True)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=ratios,
    low=st.floats(0, 1),
    total=st.integers(1, 5000),
    step=st.integers(0, 6000),
)
def test_factor_is_a_share_of_the_peak(
    schedule: Any, warmup: float, low: float, total: int, step: int
) -> None:
    config = TrainConfig(schedule=schedule, warmup_ratio=warmup, min_lr_ratio=low)
    factor = build_factor(config, total)
    assert 0 <= factor(step) <= 1
    if step >= round(warmup * total) and schedule != "constant":
        assert factor(step) >= low - 1e-12


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=ratios,
    total=st.integers(1, 300),
)
def test_factor_rises_to_the_peak_with_the_last_warm_up_step_and_never_rises_again(
    schedule: Any, warmup: float, total: int
) -> None:
    factor = build_factor(TrainConfig(schedule=schedule, warmup_ratio=warmup), total)
    num_warmup = round(warmup * total)
    course = [factor(step) for step in range(total + 1)]
    rising, falling = course[:num_warmup], course[num_warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if num_warmup:
        assert rising[-1] == 1
        assert rising[0] == pytest.approx(1 / num_warmup)
    if falling and num_warmup < total:
        assert falling[0] == 1


@pytest.mark.parametrize("low", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_factor_ends_at_the_lowest_share_and_stays_there(schedule: Any, low: float) -> None:
    factor = build_factor(TrainConfig(schedule=schedule, min_lr_ratio=low, warmup_ratio=0.2), 10)
    assert factor(10) == pytest.approx(low, abs=1e-12)
    assert factor(11) == factor(10) == factor(500)


def test_factor_follows_the_published_formulas() -> None:
    cosine = build_factor(TrainConfig(schedule="cosine", min_lr_ratio=0.1), 8)
    linear = build_factor(TrainConfig(schedule="linear", min_lr_ratio=0.1), 8)
    for step in range(9):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2
        assert cosine(step) == pytest.approx(expected)
        assert linear(step) == pytest.approx(1 - 0.9 * step / 8)


def test_constant_schedule_ignores_the_lowest_share() -> None:
    factor = build_factor(TrainConfig(schedule="constant", min_lr_ratio=0.1), 5)
    assert {factor(step) for step in range(9)} == {1.0}


# --- setting it


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_learning_rate_is_set_before_the_first_step_in_every_group(network: Network) -> None:
    config = TrainConfig(lr=0.5, warmup_ratio=0.5)
    optimizer = build_optimizer(network, config)
    rate = LearningRate(optimizer, config, 8)
    assert rates_of(optimizer) == [0.125, 0.125]
    rate.set_for(3)
    assert rates_of(optimizer) == [0.5, 0.5]
    assert rate.value == 0.5


def test_learning_rate_keeps_the_relation_of_groups_with_different_peaks() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    LearningRate(optimizer, TrainConfig(schedule="linear"), 4).set_for(2)
    assert rates_of(optimizer) == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_is_that_of_the_config_after_the_optimizer_was_restored(
    network: Network, schedule: Any
) -> None:
    old = build_optimizer(network, TrainConfig(lr=9.0))
    config = TrainConfig(lr=0.5, schedule=schedule)
    optimizer = build_optimizer(network, config)
    rate = LearningRate(optimizer, config, 10)
    optimizer.load_state_dict(old.state_dict())
    rate.set_for(4)
    expected = 0.5 * build_factor(config, 10)(4)
    assert rates_of(optimizer) == [expected, expected]
    assert rate.value == expected


@pytest.mark.parametrize(
    "fields",
    [{"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "constant", "warmup_ratio": 0.1}],
)
def test_a_schedule_that_needs_a_length_says_so_when_there_is_none(
    network: Network, fields: dict[str, Any]
) -> None:
    config = TrainConfig(**fields)
    with pytest.raises(ConfigError, match=r"^config train.schedule: .*Set train.max_steps, or"):
        LearningRate(build_optimizer(network, config), config, None)


def test_a_constant_learning_rate_needs_no_length(network: Network) -> None:
    config = TrainConfig(schedule="constant", lr=0.25)
    rate = LearningRate(build_optimizer(network, config), config, None)
    rate.set_for(10**6)
    assert rate.value == 0.25
