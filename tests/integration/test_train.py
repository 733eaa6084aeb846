"""The whole job, from a config to a result, on small data made here."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dovetail
from dovetail import hookimpl
from dovetail.config import read_config_file
from dovetail.errors import CheckpointError, NonFiniteLossError
from dovetail.preflight import check_config
from dovetail.registry import Registry
from dovetail.registry.lock import read_lock
from dovetail.run import fit
from dovetail.run.checkpoint import save_checkpoint
from dovetail.run.observer import RunObserver
from dovetail.run.tracking import read_records

Split = list[tuple[torch.Tensor, int]]


def build_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


Train = Callable[..., dovetail.TrainingResult]


@pytest.fixture
def train(config: dict[str, Any], registry: Registry, splits: dict[str, Split]) -> Train:
    def run(*overrides: str, **kwargs: Any) -> dovetail.TrainingResult:
        arguments = {"model": build_model(), "data": splits, "registry": registry, **kwargs}
        return dovetail.train(config, overrides, **arguments)

    return run


def losses_of(result: dovetail.TrainingResult) -> list[float]:
    records = read_records(result.run_dir)
    return [r["metrics"]["train/loss"] for r in records if r["kind"] == "step"]


def test_train_learns_and_returns_metrics_paths_and_model(train: Train) -> None:
    result = train("train.epochs=8")
    assert result.status == "completed"
    assert result.best_metrics["val/accuracy"] > 0.85
    assert result.num_steps == 8 * 3
    assert result.best_checkpoint is not None
    assert (result.best_checkpoint / "model.safetensors").is_file()
    assert len(result.metrics["train/loss"]) == 8 * 3 + 8
    assert (result.run_dir / "config.toml").is_file()
    lock = read_lock(result.run_dir)
    assert {(row["hook"], row["name"]) for row in lock} >= {
        ("collate", "tabular"),
        ("accumulate", "exact"),
    }


def test_train_steps_once_per_window_and_at_the_tail(train: Train) -> None:
    result = train("train.epochs=1")
    steps = [r for r in read_records(result.run_dir) if r["kind"] == "step"]
    # 91 samples in batches of 8 are 12 micro-batches: three windows of four, the last with 27.
    assert [r["micro_step"] for r in steps] == [4, 8, 12]
    assert [r["items"] for r in steps] == [32, 32, 27]


def test_train_is_the_same_for_the_same_seed_and_different_for_another(train: Train) -> None:
    first, second = losses_of(train()), losses_of(train())
    assert first == second
    assert losses_of(train("run.seed=4")) != first


def test_train_equals_a_handwritten_loop(train: Train, splits: dict[str, Split]) -> None:
    torch.manual_seed(5)
    ours = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    theirs = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    theirs.load_state_dict(ours.state_dict())
    train(
        "train.epochs=2",
        "data.shuffle=false",
        "train.schedule=constant",
        "train.optimizer=sgd",
        "train.weight_decay=0.0",
        model=ours,
        data=splits["train"],
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02)
    features = torch.stack([x for x, _ in splits["train"]])
    labels = torch.tensor([y for _, y in splits["train"]])
    for _ in range(2):
        for start in range(0, 91, 32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                theirs(features[start : start + 32]), labels[start : start + 32]
            )
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_train_takes_a_pair_and_loaders_of_the_users_own(
    train: Train, splits: dict[str, Split]
) -> None:
    pair = train(data=(splits["train"], splits["validation"]))
    own = train(
        "task.modality=nobodys",
        data={
            "train": DataLoader(splits["train"], batch_size=8),
            "val": DataLoader(splits["validation"], batch_size=8),
        },
    )
    assert pair.num_steps == own.num_steps == 9
    assert "val/accuracy" in own.final_metrics


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    def __init__(self, samples: Split) -> None:
        self._samples = samples

    def __iter__(self) -> Any:
        return iter(self._samples)


def test_train_finds_the_tail_of_a_stream_of_unknown_length(
    train: Train, splits: dict[str, Split]
) -> None:
    result = train("train.schedule=constant", "train.epochs=1", data=Stream(splits["train"]))
    steps = [r["micro_step"] for r in read_records(result.run_dir) if r["kind"] == "step"]
    assert steps == [4, 8, 12]


def test_train_stops_at_max_steps_inside_an_epoch(train: Train) -> None:
    result = train("train.max_steps=5")
    assert result.num_steps == 5
    assert "val/loss" in result.final_metrics


def test_train_stops_early_and_keeps_the_best(train: Train) -> None:
    result = train("train.epochs=30", "train.patience=2", "train.lr=0.5", "train.optimizer=sgd")
    assert result.status in {"stopped early", "completed"}
    values = [
        r["metrics"]["val/loss"] for r in read_records(result.run_dir) if r["kind"] == "evaluation"
    ]
    assert result.best_metrics["val/loss"] == min(values)
    kept = sorted(p.name for p in (result.run_dir / "checkpoints").iterdir())
    assert len(kept) <= 2


class Probed(nn.Module):
    """Logs a number that is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.probe = build_model(), 0.0

    def forward(self, features: torch.Tensor) -> Any:
        dovetail.log_metric("probe", self.probe)
        return self.body(features)


def test_train_goes_on_without_a_checkpoint_that_cannot_be_written(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = Probed(), itertools.count(1)

    class Setting(RunObserver):
        def on_step(self, epoch: int, micro_batch: int, step: int, metrics: Any) -> None:
            model.probe = {3: 3.0, 6: 1.0, 9: 2.0}.get(step, 0.0)

    def save(*arguments: Any, **named: Any) -> Path:
        if next(calls) == 2:
            raise CheckpointError("there is no space.")
        return save_checkpoint(*arguments, **named)

    monkeypatch.setattr(fit, "save_checkpoint", save)
    with pytest.warns(UserWarning, match=r"there is no space\. The run goes on"):
        result = train("train.monitor=val/probe", model=model, observer=Setting())
    assert result.num_steps == 9
    # The second epoch was the best, and is lost.
    assert result.best_checkpoint == result.run_dir / "checkpoints" / "step-000009"
    assert result.best_metrics["val/probe"] == 2.0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_learns_in_every_precision(train: Train, precision: str) -> None:
    result = train("train.epochs=6", f"train.precision={precision}")
    assert result.best_metrics["val/accuracy"] > 0.8
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


class Exploding(nn.Module):
    """Gives NaN for one sample, which is planted in the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        poison = torch.where(features[:, :1] > 90, torch.nan, 0.0)
        return self.linear(features.clamp(max=5.0)) + poison


def test_train_skips_a_window_whose_loss_is_not_finite(
    train: Train, splits: dict[str, Split]
) -> None:
    poisoned = [(x.clone(), y) for x, y in splits["train"]]
    poisoned[40][0][0] = 99.0
    with pytest.warns(UserWarning, match="window is skipped, as it is not finite") as caught:
        result = train("train.epochs=2", model=Exploding(), data=poisoned)
    kinds = [r["kind"] for r in read_records(result.run_dir)]
    assert kinds.count("skip") == 2
    assert kinds.count("step") == 4
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert len(caught) == 1


def test_train_gives_up_after_too_many_skipped_windows(
    train: Train, splits: dict[str, Split]
) -> None:
    poisoned = [(torch.full_like(x, 99.0), y) for x, y in splits["train"]]
    model = Exploding()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(NonFiniteLossError, match="2 windows in a row"),
    ):
        train("train.max_skipped_windows=2", model=model, data=poisoned)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class InterruptAt(RunObserver):
    """Sends the process a SIGINT after a given optimizer step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, epoch: int, micro_batch: int, step: int, metrics: Any) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_train_resumes_to_the_bit_after_an_interrupt(train: Train, step: int) -> None:
    whole = train()
    interrupted = train(observer=InterruptAt(step))
    assert interrupted.status == "interrupted"
    assert interrupted.num_steps == step
    resumed = train(resume=interrupted.run_dir)
    assert resumed.status == "completed"
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.final_metrics == whole.final_metrics
    assert resumed.best_metrics == whole.best_metrics
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_train_resumes_the_latest_run_and_refuses_other_settings(train: Train) -> None:
    interrupted = train(observer=InterruptAt(2))
    with pytest.raises(dovetail.RunError, match=r"train\.batch_size was 8 and is 4"):
        train("train.batch_size=4", resume="latest")
    resumed = train(resume="latest")
    assert resumed.run_dir == interrupted.run_dir
    with pytest.raises(dovetail.ConfigError, match=r"train\.epochs: .*has done all its 3 epochs"):
        train(resume="latest")
    again = train("train.epochs=4", resume="latest")
    assert again.num_steps == 12
    # What a run went on with is what its folder tells, and what a later resume begins from.
    assert read_config_file(again.run_dir / "config.toml")["train"]["epochs"] == 4


def test_train_takes_a_loss_function_of_the_users_own(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_loss.py").write_text(
        "import torch.nn.functional as F\n"
        "def loss(outputs, batch):\n"
        "    return F.cross_entropy(outputs, batch['labels'], label_smoothing=0.1), len(outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = train("train.loss=own_loss:loss", "train.epochs=6")
    losses = losses_of(result)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


class WithMask(nn.Module):
    """Takes its inputs by name and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.seen: set[str] = set()

    def forward(self, features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        if attention_mask is not None:
            self.seen.add("attention_mask")
            features = features * attention_mask
        return {"logits": self.linear(features)}


def test_train_passes_inputs_by_the_names_of_the_signature(
    train: Train, splits: dict[str, Split]
) -> None:
    samples = [
        {"extra": i, "attention_mask": torch.ones(6), "labels": y, "features": x}
        for i, (x, y) in enumerate(splits["train"])
    ]
    model = WithMask()
    train("train.epochs=1", model=model, data=samples)
    assert model.seen == {"attention_mask"}


class Recorder:
    """A tracker that keeps what it is given, and forgets what it is told to."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, rows: list[tuple[int, float]]) -> None:
        self._rows = rows

    def rewind(self, step: int) -> None:
        self._rows[:] = [row for row in self._rows if row[0] <= step]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self._rows.append((step, metrics["train/loss"]))

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_figure(self, name: str, path: Path, step: int) -> None: ...

    def log_artifact(self, name: str, path: Path) -> None: ...

    def close(self, status: str) -> None: ...


def test_train_gives_a_tracker_every_step_once_across_a_resume(
    train: Train, registry: Registry
) -> None:
    rows: list[tuple[int, float]] = []

    class Plugin:
        @hookimpl
        def dovetail_log(self) -> Recorder:
            return Recorder(rows)

    registry.register(Plugin(), hook="log", name="recorder")
    interrupted = train("log.use=recorder", observer=InterruptAt(4))
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    result = train("log.use=recorder", resume=interrupted.run_dir)
    assert [step for step, _ in rows] == list(range(1, 10))
    assert [loss for _, loss in rows] == losses_of(result)


def test_train_gives_a_tracker_the_report_and_the_bundle_before_its_end(
    train: Train, registry: Registry
) -> None:
    pytest.importorskip("matplotlib")
    given: list[tuple[Any, ...]] = []

    class Keeper(Recorder):
        capabilities = frozenset({"figures", "artifacts"})

        def log_figure(self, name: str, path: Path, step: int) -> None:
            given.append((name, path, step, path.read_bytes()[:4]))

        def log_artifact(self, name: str, path: Path) -> None:
            given.append((name, path, (path / "manifest.json").is_file()))

        def close(self, status: str) -> None:
            given.append((status,))

    class Plugin:
        @hookimpl
        def dovetail_log(self) -> Recorder:
            return Keeper([])

    registry.register(Plugin(), hook="log", name="keeper")
    result = train("log.use=keeper", "train.epochs=1", "export.use=onnx")
    assert result.bundle is not None
    assert given == [
        ("report", result.run_dir / "report.png", 3, b"\x89PNG"),
        ("bundle", result.bundle.path, True),
        ("completed",),
    ]


def test_train_goes_on_when_a_tracker_raises_always(train: Train, registry: Registry) -> None:
    class Broken(Recorder):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            raise ConnectionError("the server is gone")

    class Plugin:
        @hookimpl
        def dovetail_log(self) -> Recorder:
            return Broken([])

    registry.register(Plugin(), hook="log", name="broken")
    with pytest.warns(UserWarning, match="tracker 'broken': is parked: ConnectionError") as caught:
        result = train("log.use=broken")
    assert len(caught) == 1
    assert result.status == "completed"
    assert len(losses_of(result)) == 9


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Draws noise for every sample, as augmentation does."""

    def __init__(self, samples: Split) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        features, label = self._samples[index]
        return features + 0.1 * torch.randn(6), label


def test_train_resumes_to_the_bit_with_data_that_draw_at_random(
    train: Train, splits: dict[str, Split]
) -> None:
    data = {**splits, "train": Augmented(splits["train"])}
    whole = train(data=data)
    interrupted = train(data=data, observer=InterruptAt(4))
    resumed = train(data=data, resume=interrupted.run_dir)
    assert losses_of(resumed) == losses_of(whole)


class ShortLoader(DataLoader[Any]):
    """Says that it has more batches than it gives."""

    def __len__(self) -> int:
        return super().__len__() + 1


def test_train_steps_the_tail_of_a_loader_that_gives_less_than_its_length(
    train: Train, splits: dict[str, Split]
) -> None:
    result = train("train.epochs=1", data=ShortLoader(splits["train"], batch_size=8))
    steps = [r["items"] for r in read_records(result.run_dir) if r["kind"] == "step"]
    assert steps == [32, 32, 27]


def test_train_says_that_a_second_validation_split_is_not_used(
    train: Train, splits: dict[str, Split]
) -> None:
    with pytest.warns(UserWarning, match="only 'validation' is evaluated"):
        train("train.max_steps=1", data={**splits, "test": splits["validation"]})


def test_train_takes_a_config_with_none_as_it_is(train: Train, tmp_path: Path) -> None:
    config = dovetail.TrainingConfig.model_validate(
        {"run": {"dir": str(tmp_path)}, "model": {"kwargs": {"width": None}}}
    )
    checked = check_config(config)
    assert checked.config.model.kwargs == {"width": None}


def test_the_graph_is_kept_where_the_config_asks_and_changes_no_loss(
    train: Train, registry: Registry
) -> None:
    given: list[Path] = []

    class Keeper(Recorder):
        capabilities = frozenset({"graphs"})

        def log_graph(self, path: Path) -> None:
            given.append(path)

    class Plugin:
        @hookimpl
        def dovetail_log(self) -> Recorder:
            return Keeper([])

    registry.register(Plugin(), hook="log", name="keeper")
    drawn = train("train.epochs=1", "log.graph=true", "log.use=keeper")
    assert given == [drawn.run_dir / "graph.json"]
    plain = train("train.epochs=1")
    assert not (plain.run_dir / "graph.json").exists()
    assert losses_of(plain) == losses_of(drawn)


def test_a_report_is_drawn_unless_the_config_says_no(train: Train) -> None:
    pytest.importorskip("matplotlib")
    drawn, bare = train("train.epochs=1"), train("train.epochs=1", "run.report=false")
    assert drawn.report == drawn.run_dir / "report.html"
    assert bare.report is None
    assert not list(bare.run_dir.glob("report.*"))
