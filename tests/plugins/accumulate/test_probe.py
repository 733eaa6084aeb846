"""The probe sees what a loop does with a loss, whoever wrote the loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dovetail.errors import AccumulationConflictError
from dovetail_plugins.accumulate.probe import LoopProbe

NUM_BATCHES = 8
ROWS = [{"x": torch.full((2, 2), float(index))} for index in range(NUM_BATCHES)]


def loader():
    return torch.utils.data.DataLoader(ROWS, batch_size=None)


def plain(model, optimizer, probe, steps, folder):
    for index, row in enumerate(loader(), start=1):
        (probe.watch(model(row["x"]).mean()) / steps).backward()
        if index % steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def lightning(name, with_scheduler=False):
    def train(model, optimizer, probe, steps, folder):
        package = pytest.importorskip(name, reason="Lightning is not installed")

        class Module(package.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = model

            def training_step(self, row, index):
                return probe.watch(self.model(row["x"]).mean())

            def configure_optimizers(self):
                return optimizer

        scheduler = package.callbacks.GradientAccumulationScheduler({0: steps})
        trainer = package.Trainer(
            max_epochs=1,
            accumulate_grad_batches=1 if with_scheduler else steps,
            callbacks=[scheduler] if with_scheduler else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=folder,
        )
        trainer.fit(Module(), loader())

    return train


def accelerated(model, optimizer, probe, steps, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    accelerator.gradient_accumulation_steps = steps  # another one may have been made before
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for row in batches:
        with accelerator.accumulate(model):
            accelerator.backward(probe.watch(model(row["x"]).mean()))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.gradient_accumulation_steps = 1


def hf_trainer(model, optimizer, probe, steps, folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return probe.watch(model(inputs["x"]).mean())

        def get_train_dataloader(self):
            return loader()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        gradient_accumulation_steps=steps,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=ROWS, optimizers=(optimizer, None)).train()


HOSTS = {
    "plain": plain,
    "lightning.pytorch": lightning("lightning.pytorch"),
    "pytorch_lightning": lightning("pytorch_lightning"),
    "scheduler of Lightning": lightning("lightning.pytorch", with_scheduler=True),
    "Accelerate": accelerated,
    "HF Trainer": hf_trainer,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", [1, 4])
def test_probe_tells_whether_host_accumulates(host, steps, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LoopProbe(optimizer)
    assert probe.steps is probe.factor is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hosts, about loaders and models so small
        HOSTS[host](model, optimizer, probe, steps, tmp_path)
    assert probe.steps == steps
    assert probe.factor == pytest.approx(1 / steps)
    assert probe.is_accumulating == (steps > 1)
    probe.check(1)
    if steps == 1:
        probe.check(4)
        return
    with pytest.raises(AccumulationConflictError) as caught:
        probe.check(2)
    for text in ("conflict", "accumulation_steps: 2", "backward passes per step: 4", "  3. "):
        assert text in str(caught.value)


def test_probe_leaves_loss_and_later_steps_alone():
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    probe = LoopProbe(optimizer)
    optimizer.step()  # before the first loss
    for number in (2, 3):
        for _ in range(number):
            loss = parameter * 3
            assert probe.watch(loss) is loss
            loss.backward()
        assert parameter.grad.item() == 3 * number
        optimizer.step()
        optimizer.zero_grad()
    assert probe.steps == 2
    assert not optimizer._optimizer_step_post_hooks
