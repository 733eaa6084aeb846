"""Unmodified loops of others take exact steps when their batches come with our factor."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail.errors import AccumulationConflictError, ConfigError
from dovetail_plugins.accumulate.guest import ExactBatches

LENGTHS = [[9, 2], [1], [12, 3], [4], [2], [7, 7, 7], [11], [1, 1], [5], [8, 2]]
"""Sequences of ten micro-batches; with four per step a tail of two is left."""
STEPS = 4


@pytest.fixture
def batches(language):
    return [language.batch(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


@pytest.fixture
def check_exact(language, relative_error, batches):
    """Return what trains with a host, and compares each of its steps with the large batch."""

    def record(optimizer):
        # After the step: in Lightning's, the last backward of the window runs within it.
        gradients = []
        parameters = optimizer.param_groups[0]["params"]
        optimizer.register_step_post_hook(
            lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        )
        return gradients

    def check(train, num_epochs=1, tolerance=1e-6):
        model = language.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = record(optimizer)
        train(model, optimizer)
        large = language.model()
        large_optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
        expected = record(large_optimizer)
        for _ in range(num_epochs):
            for start in range(0, len(batches), STEPS):
                together = language.concatenate(batches[start : start + STEPS])
                language.loss(large, together).backward()
                large_optimizer.step()
                large_optimizer.zero_grad()
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        assert max(errors) <= tolerance

    return check


def loader_of(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


# The factor


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=9),
    steps=st.integers(1, 4),
    divided_by=st.sampled_from(["steps", "length", "nothing"]),
)
def test_exact_batches_make_dividing_loop_exact(
    language, relative_error, lengths, steps, divided_by
):
    model = language.model(torch.float64)
    batches = [language.batch(each, seed) for seed, each in enumerate(lengths)]
    exact = ExactBatches(batches, steps, language.count, divided_by=divided_by)
    assert len(exact) == len(batches)
    pairs = list(exact)
    assert [batch for batch, _ in pairs] == batches
    for start in range(0, len(pairs), steps):
        window = pairs[start : start + steps]
        divisor = {"steps": steps, "length": len(window), "nothing": 1}[divided_by]
        model.zero_grad()
        for batch, factor in window:
            (language.loss(model, batch) * factor / divisor).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        language.loss(model, language.concatenate([batch for batch, _ in window])).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative_error(found, expected) <= 1e-12


def test_exact_batches_put_factor_into_mapping_under_key():
    batches = [{"size": 1}, {"size": 3}]
    exact = ExactBatches(batches, 2, lambda batch: batch["size"], key="factor")
    assert list(exact) == [{"size": 1, "factor": 0.5}, {"size": 3, "factor": 1.5}]
    assert batches == [{"size": 1}, {"size": 3}]
    assert list(exact) == list(exact)


def test_exact_batches_give_factor_zero_when_window_has_no_items():
    assert list(ExactBatches(["a", "b"], 2, lambda batch: 0)) == [("a", 0.0), ("b", 0.0)]


def test_exact_batches_show_what_the_loader_has(batches):
    loader = loader_of(batches)
    exact = ExactBatches(loader, 2, lambda batch: 1)
    assert exact.dataset is batches
    assert exact.sampler is loader.sampler
    with pytest.raises(AttributeError):
        exact.set_epoch  # noqa: B018  # this loader has none
    with pytest.raises(TypeError):
        len(ExactBatches(iter(batches), 2, lambda batch: 1))


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_exact_batches_refuse_steps_when_no_count(steps):
    with pytest.raises(ConfigError, match="accumulation_steps must be >= 1, got"):
        ExactBatches([], steps, len)


def test_exact_batches_refuse_divisor_when_unknown():
    with pytest.raises(ConfigError, match='got \'sum\'; expected "steps", "length" or "nothing"'):
        ExactBatches([], 1, len, divided_by="sum")


def test_exact_batches_refuse_key_when_batch_is_no_mapping():
    with pytest.raises(ConfigError, match="got 'factor' for a batch that is a tuple"):
        list(ExactBatches([(1, 2)], 1, len, key="factor"))


# The hosts


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_exact_batches_make_lightning_exact(language, check_exact, batches, name, tmp_path):
    package = pytest.importorskip(name, reason="Lightning is not installed")

    class Module(package.LightningModule):
        def __init__(self, model, optimizer):
            super().__init__()
            self.model, self.optimizer = model, optimizer

        def training_step(self, batch_and_factor, index):
            batch, factor = batch_and_factor
            return language.loss(self.model, batch) * factor

        def configure_optimizers(self):
            return self.optimizer

    def train(model, optimizer):
        trainer = package.Trainer(
            max_epochs=2,
            accumulate_grad_batches=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        with warnings.catch_warnings():
            # Lightning recommends workers, and deprecates of torch's what torch itself uses.
            warnings.simplefilter("ignore")
            loader = ExactBatches(loader_of(batches), STEPS, language.count)
            trainer.fit(Module(model, optimizer), loader)

    check_exact(train, num_epochs=2)


def test_exact_batches_make_accelerate_exact(language, check_exact, batches):
    accelerate = pytest.importorskip("accelerate")

    def train(model, optimizer):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(batches))
        exact = ExactBatches(loader, STEPS, language.count)
        for _ in range(2):
            for batch, factor in exact:
                with accelerator.accumulate(model):
                    accelerator.backward(language.loss(model, batch) * factor)
                    optimizer.step()
                    optimizer.zero_grad()
        assert not accelerator.gradient_state.in_dataloader

    check_exact(train, num_epochs=2)


def test_exact_batches_refuse_accelerate_when_it_accumulates_over_others(batches):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    loader = accelerator.prepare(loader_of(batches))
    with pytest.raises(AccumulationConflictError) as caught:
        next(iter(ExactBatches(loader, 2, lambda batch: 1)))
    for text in ("conflict", "accumulation_steps: 2", "gradient_accumulation_steps: 4", "  3. "):
        assert text in str(caught.value)


@pytest.mark.parametrize("divided_by", ["length", "nothing"])
def test_exact_batches_make_hf_trainer_exact(language, check_exact, batches, tmp_path, divided_by):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            rows = [{"tokens": tokens, "targets": targets} for tokens, targets in batches]
            loader = self.accelerator.prepare(loader_of(rows))
            return ExactBatches(
                loader,
                self.args.gradient_accumulation_steps,
                lambda row: int((row["targets"] != -100).sum()),
                key="loss_factor",
                divided_by=divided_by,
            )

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return (
                language.loss(model, (inputs["tokens"], inputs["targets"]))
                * (inputs["loss_factor"])
            )

    def train(model, optimizer):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            gradient_accumulation_steps=STEPS,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the Trainer, about a model that is not its own
            trainer = Trainer(model, arguments, train_dataset=batches, optimizers=(optimizer, None))
            trainer.loss_is_scaled_for_ga = divided_by == "nothing"
            trainer.train()

    check_exact(train, num_epochs=2)
