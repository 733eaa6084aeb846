from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from dovetail.errors import AccumulationConflictError
from dovetail_plugins.accumulate.exact import GradientAccumulator
from dovetail_plugins.accumulate.hosts import lightning_accumulation


class StandInTrainer:
    """Has what Lightning's trainer has; the tests put it where Lightning's class would be."""

    def __init__(self, accumulate_grad_batches=1, callbacks=()):
        self.accumulate_grad_batches = accumulate_grad_batches
        self.callbacks = list(callbacks)
        self.global_step = 17


class StandInScheduler:
    def __init__(self, scheduling):
        self.scheduling = scheduling


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request, monkeypatch):
    """Make `StandInTrainer` what the import name of Lightning's package holds."""
    package = ModuleType(request.param)
    package.Trainer = StandInTrainer
    callbacks = ModuleType(f"{request.param}.callbacks")
    callbacks.GradientAccumulationScheduler = StandInScheduler
    monkeypatch.setitem(sys.modules, request.param, package)
    monkeypatch.setitem(sys.modules, callbacks.__name__, callbacks)
    return package


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_conflict_names_both_settings_and_three_ways_out(lightning, parts):
    with pytest.raises(AccumulationConflictError) as caught:
        GradientAccumulator(parts[1], 4, trainer=StandInTrainer(4))
    message = str(caught.value)
    for text in (
        "conflict",
        "accumulation_steps: 4",
        "accumulate_grad_batches: 4",
        "Resolution options",
        "  1. ",
        "  2. ",
        "  3. ",
    ):
        assert text in message
    assert isinstance(caught.value, ValueError)


def test_conflict_is_found_when_trainer_is_a_subclass(lightning, parts):
    class Custom(StandInTrainer):
        pass

    with pytest.raises(AccumulationConflictError, match="accumulate_grad_batches: 2"):
        GradientAccumulator(parts[1], 4, trainer=Custom(2))


def test_conflict_is_found_when_a_scheduler_will_accumulate(lightning, parts):
    trainer = StandInTrainer(1, callbacks=[object(), StandInScheduler({0: 1, 4: 8})])
    with pytest.raises(AccumulationConflictError, match="accumulate_grad_batches: 8"):
        GradientAccumulator(parts[1], 4, trainer=trainer)


def test_accumulator_leaves_all_to_trainer_when_only_that_accumulates(lightning, parts):
    model, optimizer = parts
    trainer = StandInTrainer(4)
    accumulator = GradientAccumulator(optimizer, 1, trainer=trainer)
    assert accumulator.is_lightning_managed
    before = model.weight.detach().clone()
    with accumulator.micro_batch():
        loss = model(torch.ones(1, 2)).mean()
        assert not accumulator.accumulate(loss, model, is_final_batch=True)
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    assert not accumulator.flush(model)
    assert accumulator.effective_step == accumulator.stats.optimizer_steps == 17
    trainer.global_step = 18
    assert accumulator.effective_step == 18
    assert accumulator.stats.total_steps == 1


def test_accumulator_works_itself_when_trainer_does_not_accumulate(lightning, parts):
    model, optimizer = parts
    accumulator = GradientAccumulator(optimizer, 2, trainer=StandInTrainer(1))
    assert not accumulator.is_lightning_managed
    read = [accumulator.accumulate(model(torch.ones(1, 2)).mean(), model) for _ in range(2)]
    assert read == [False, True]
    assert accumulator.effective_step == 1


@pytest.mark.parametrize("is_lightning_imported", [False, True])
def test_accumulator_works_itself_when_trainer_is_only_named_so(
    request, parts, is_lightning_imported
):
    if is_lightning_imported:
        request.getfixturevalue("monkeypatch").setitem(
            sys.modules, "lightning.pytorch", SimpleNamespace(Trainer=StandInTrainer)
        )

    class Trainer:
        accumulate_grad_batches = 4
        global_step = 99

    model, optimizer = parts
    accumulator = GradientAccumulator(optimizer, 1, trainer=Trainer())
    before = model.weight.detach().clone()
    assert accumulator.accumulate(model(torch.ones(1, 2)).mean(), model)
    assert not torch.equal(model.weight, before)
    assert accumulator.effective_step == 1
    assert not accumulator.is_lightning_managed


def test_lightning_accumulation_is_one_when_module_optimises_by_hand(lightning):
    trainer = StandInTrainer(4)
    trainer.lightning_module = SimpleNamespace(automatic_optimization=False)
    assert lightning_accumulation(trainer) == 1
    trainer.lightning_module.automatic_optimization = True
    assert lightning_accumulation(trainer) == 4


@pytest.mark.parametrize(("setting", "steps"), [(8, 8), ("auto", 2)])
def test_lightning_accumulation_asks_deepspeed_strategy(lightning, monkeypatch, setting, steps):
    class DeepSpeedStrategy:
        config = {"gradient_accumulation_steps": setting}

    strategies = SimpleNamespace(DeepSpeedStrategy=DeepSpeedStrategy)
    monkeypatch.setitem(sys.modules, f"{lightning.__name__}.strategies", strategies)
    trainer = StandInTrainer(2)
    trainer.strategy = DeepSpeedStrategy()
    assert lightning_accumulation(trainer) == steps


def test_deepspeed_engine_is_found(parts, monkeypatch):
    class DeepSpeedEngine(nn.Module):
        global_steps = 5

        def gradient_accumulation_steps(self):
            return 4

    module = SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    with pytest.raises(AccumulationConflictError, match="gradient_accumulation_steps: 4"):
        GradientAccumulator(parts[1], 2, model=DeepSpeedEngine())
    managed = GradientAccumulator(parts[1], 1, trainer=DeepSpeedEngine())
    assert managed.is_host_managed
    assert not managed.is_lightning_managed
    assert managed.effective_step == 5


def test_accelerator_is_found_and_its_steps_are_counted(parts):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = accelerator.prepare(*parts)
    for where in ({"trainer": accelerator}, {}):  # the optimizer shows it, too
        with pytest.raises(AccumulationConflictError, match="gradient_accumulation_steps: 4"):
            GradientAccumulator(optimizer, 2, **where)
    accumulator = GradientAccumulator(optimizer, 1, trainer=accelerator)
    assert accumulator.is_host_managed
    for _ in range(8):
        with accelerator.accumulate(model):
            loss = model(torch.ones(1, 2)).mean()
            assert not accumulator.accumulate(loss, model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accumulator.effective_step == 2
    accelerator.gradient_accumulation_steps = 1
    assert not GradientAccumulator(optimizer, 4, trainer=accelerator).is_host_managed


def test_accumulator_works_itself_when_only_optimizer_shows_an_accelerator(parts):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = accelerator.prepare(*parts)
    accumulator = GradientAccumulator(optimizer, 1)
    assert accumulator.accumulate(model(torch.ones(1, 2)).mean(), model)
    accelerator.gradient_accumulation_steps = 1  # it is shared by all accelerators


def test_hf_trainer_is_found(parts, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Custom(transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), gradient_accumulation_steps=4, use_cpu=True, report_to=[]
    )
    trainer = Custom(parts[0], arguments)
    with pytest.raises(AccumulationConflictError, match="gradient_accumulation_steps: 4"):
        GradientAccumulator(parts[1], 2, trainer=trainer)
    accumulator = GradientAccumulator(parts[1], 1, trainer=trainer)
    trainer.state.global_step = 7
    assert accumulator.is_host_managed
    assert accumulator.effective_step == 7


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_accumulation_reads_real_trainer(name):
    package = pytest.importorskip(name, reason="Lightning is not installed")
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    assert lightning_accumulation(package.Trainer(**settings)) == 1
    assert lightning_accumulation(package.Trainer(accumulate_grad_batches=4, **settings)) == 4
    scheduler = package.callbacks.GradientAccumulationScheduler({0: 1, 2: 6})
    assert lightning_accumulation(package.Trainer(callbacks=[scheduler], **settings)) == 6
