"""What a run asks of its plugins before the first step, and that it asks no hook in a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from torch import nn

import dovetail
from dovetail import PluginOptions, TaskSpec, hookimpl
from dovetail.errors import BrokenPluginError, LockError, PluginError
from dovetail.registry import Registry
from dovetail.run.observer import RunObserver, RunPlan

Train = Callable[..., dovetail.TrainingResult]


def build_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def train(config: dict[str, Any], registry: Registry, splits: dict[str, Any]) -> Train:
    def run(*overrides: str, **kwargs: Any) -> dovetail.TrainingResult:
        return dovetail.train(
            config, overrides, model=build_model(), data=splits, registry=registry, **kwargs
        )

    return run


class Answering:
    """A plugin of every hook that answers what it was made with."""

    def __init__(self, part: Any) -> None:
        self.part = part

    @hookimpl
    def dovetail_collate(self, task: TaskSpec) -> Any:
        return self.part

    @hookimpl
    def dovetail_accumulate(self) -> Any:
        return self.part

    @hookimpl
    def dovetail_compile(self, model: nn.Module) -> Any:
        return self.part(model)

    @hookimpl
    def dovetail_export(self) -> Any:
        return self.part


def refuse(
    train: Train, registry: Registry, hook: Any, part: Any, config: dict[str, Any], *more: str
) -> str:
    """Return why a run refuses a part; it leaves no run's folder behind."""
    registry.register(Answering(part), hook=hook, name="mine")
    with pytest.raises(BrokenPluginError) as caught:
        train(f"{hook}.use=mine", *more)
    assert not Path(config["run"]["dir"]).exists()
    message = str(caught.value)
    assert message.startswith("plugin 'mine' (this session)")
    return message


# --- parts that break their protocol


@pytest.mark.parametrize(
    ("collate", "shown"),
    [
        (lambda samples: [1, 2], "its collator returned a list; expected a dict of tensors"),
        (lambda samples: None, "its collator returned a NoneType"),
        (lambda samples: {"features": [1.0]}, "returned a list under 'features'"),
        (lambda samples: {3: torch.ones(1)}, "returned a Tensor under 3"),
        (lambda samples, task: {}, "whose __call__(samples, task); expected __call__(samples)."),
        (3, "answered a int without __call__; expected a Collator"),
    ],
)
def test_a_collator_that_breaks_its_protocol_is_named_before_the_run_begins(
    train: Train, registry: Registry, config: dict[str, Any], collate: Any, shown: str
) -> None:
    assert shown in refuse(train, registry, "collate", collate, config)


def test_a_collator_that_cannot_travel_to_workers_is_named_where_there_are_any(
    train: Train, registry: Registry, config: dict[str, Any]
) -> None:
    def collate(samples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}

    message = refuse(train, registry, "collate", collate, config, "data.num_workers=2")
    assert "its collator cannot be pickled: " in message
    assert "expected one that can travel to the 2 workers of data.num_workers" in message
    assert train("collate.use=mine", "train.epochs=1").status == "completed"


def test_an_accumulator_without_flush_is_named(
    train: Train, registry: Registry, config: dict[str, Any]
) -> None:
    names = (
        "accumulation_steps effective_step is_window_open stats last_window micro_batch "
        "accumulate reset_epoch state_dict load_state_dict"
    )
    part = type("Half", (), {name: (lambda self, *a, **k: None) for name in names.split()})()
    message = refuse(train, registry, "accumulate", part, config)
    assert "answered a Half without flush; expected an Accumulator" in message


def test_an_exporter_whose_method_takes_other_arguments_is_named(
    train: Train, registry: Registry, config: dict[str, Any]
) -> None:
    class Odd:
        requirements: tuple[str, ...] = ()
        carries_code = False

        def export(self, model: Any) -> None: ...
        def load(self, path: Path) -> None: ...

    message = refuse(train, registry, "export", Odd(), config)
    assert "answered a Odd whose export(model" in message
    assert "expected export(model, inputs, directory)" in message


def test_a_compiler_that_renames_the_weights_is_named(
    train: Train, registry: Registry, config: dict[str, Any]
) -> None:
    message = refuse(train, registry, "compile", nn.Sequential, config)
    assert "changed the keys of the model's state_dict: '0.weight' became '0.0.weight'" in message


def test_a_plugin_that_raises_is_named_with_its_traceback(train: Train, registry: Registry) -> None:
    def raising(model: nn.Module) -> nn.Module:
        raise ZeroDivisionError("seven")

    registry.register(Answering(raising), hook="compile", name="mine")
    with pytest.raises(PluginError) as caught:
        train("compile.use=mine")
    assert str(caught.value).startswith(
        "plugin 'mine' (this session) hook dovetail_compile: raised ZeroDivisionError: seven "
        f"({__file__}:"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


# --- locks


def test_frozen_runs_again_with_the_same_plugins_and_refuses_others(train: Train) -> None:
    first = train("train.epochs=1")
    assert train("train.epochs=1", frozen=first.run_dir).num_steps == first.num_steps
    with pytest.raises(LockError) as caught:
        train("train.epochs=1", "accumulate.exact.steps=2", frozen=first.run_dir)
    assert str(caught.value) == (
        f"lock {str(first.run_dir)!r}: accumulate plugin 'exact': its options differ. "
        "Install what the lock names, or run without it."
    )
    path = first.run_dir / "plugins.lock.json"
    with pytest.raises(LockError, match="log plugin 'tensorboard' takes part, and is not in the"):
        train("train.epochs=1", "log.use=tensorboard", frozen=path)
    runs = list(first.run_dir.parent.iterdir())
    assert len(runs) == 2


def test_lock_has_one_digest_for_equal_plugins_and_options(train: Train) -> None:
    digests = [
        json.loads((train(*more).run_dir / "plugins.lock.json").read_text())["digest"]
        for more in (
            ("train.epochs=1",),
            ("train.epochs=1", "run.name=other"),
            ("train.epochs=1", "accumulate.exact.max_grad_norm=0.5"),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


# --- the per-step path


class Counting(RunObserver):
    """Counts hook calls from the first step to the last."""

    def __init__(self, counted: list[str]) -> None:
        self.counted = counted

    def on_start(self, plan: RunPlan, run_dir: Path) -> None:
        """Forget what was called so far: the parts are made."""
        assert self.counted, "nothing was counted while the parts were made"
        self.counted.clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the hooks that are called, by whomever."""
    names: list[str] = []
    original = pluggy.HookCaller.__call__

    def call(self: pluggy.HookCaller, **arguments: object) -> Any:
        names.append(self.name)
        return original(self, **arguments)

    monkeypatch.setattr(pluggy.HookCaller, "__call__", call)
    return names


def test_no_hook_is_called_in_a_hundred_steps(
    train: Train, registry: Registry, counted: list[str]
) -> None:
    class Wrapping:
        @hookimpl(wrapper=True)
        def dovetail_collate(self, options: PluginOptions) -> Iterator[None]:
            return (yield)  # type: ignore[return-value]

    registry.register(Wrapping(), hook="wrap", name="around")
    result = train(
        'run.plugins=["around"]',
        "train.epochs=40",
        "accumulate.exact.steps=1",
        "train.max_steps=100",
        "log.use=tensorboard",
        observer=Counting(counted),
    )
    assert result.num_steps == 100
    assert [name for name in counted if name.startswith("dovetail_")] == []
