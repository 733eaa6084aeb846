from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dovetail.errors import CheckpointError
from dovetail.run.checkpoint import (
    Progress,
    checkpoint_path,
    last_checkpoint,
    load_progress,
    load_state,
    load_weights,
    prune,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)


class Tied(nn.Module):
    """A head tied to its embedding, a buffer of counts, and a transposed weight."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.mix = nn.Parameter(torch.randn(4, width).t())


class Part:
    """Anything with a state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Every test leaves the random generators as it found them."""
    state = random_state()
    yield
    set_random_state(state)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_weights_come_back_to_the_bit_and_stay_tied(checkpoints: Path) -> None:
    model = Tied()
    model.norm(torch.randn(6, 3))
    path = save_checkpoint(checkpoints, model, {}, Progress(step=7))
    saved = weights_of(model)
    other = Tied()
    load_weights(path, other)
    assert_same_weights(other, saved)
    assert other.head.weight is other.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_precision_come_back(checkpoints: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    path = save_checkpoint(checkpoints, model, {}, Progress())
    other = nn.Linear(3, 2).to(dtype)
    load_weights(path, other)
    assert_same_weights(other, weights_of(model))


def test_weights_are_saved_under_the_keys_of_the_users_own_module(checkpoints: Path) -> None:
    model = nn.Linear(3, 2)
    path = save_checkpoint(checkpoints, nn.DataParallel(model), {}, Progress())
    other = nn.Linear(3, 2)
    load_weights(path, other)
    assert_same_weights(other, weights_of(model))


def test_optimizer_continues_as_if_nothing_had_been(checkpoints: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    path = save_checkpoint(checkpoints, model, {"optimizer": optimizer, "scaler": None}, Progress())
    step(model, optimizer)

    resumed, other = build()
    torch.manual_seed(1234)
    load_weights(path, resumed)
    load_state(path, {"optimizer": other, "scaler": None})
    step(resumed, other)
    assert_same_weights(resumed, weights_of(model))


def draw() -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    )


def test_random_generators_continue_to_the_bit(checkpoints: Path) -> None:
    seed_everything(5)
    # An odd number of normal draws leaves one of each pair behind.
    random.gauss(0, 1)
    np.random.standard_normal()
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress())
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    load_state(path, {})
    assert [draw() for _ in range(3)] == expected


def test_saving_draws_nothing(checkpoints: Path) -> None:
    model = nn.Linear(1, 1)
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    save_checkpoint(checkpoints, model, {}, Progress())
    assert draw() == expected


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_every_seed_a_config_takes_seeds_all_generators(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first


def test_progress_comes_back(checkpoints: Path) -> None:
    progress = Progress(
        step=7, epoch=2, micro_batch=3, micro_step=31, items=248, best_value=0.5, best_step=6,
        num_bad_evaluations=1, log_bytes=999, metrics={"val/loss": 0.5}, best_metrics={"a": 1.0},
    )  # fmt: skip
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, progress)
    assert load_progress(path) == progress
    assert path == checkpoint_path(checkpoints, 7) == checkpoints / "step-000007"


# --- what cannot be read


def refusal(call: Callable[[], object], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"checkpoint {str(path)!r}: ")
    return message


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (lambda: nn.Linear(3, 4), "size mismatch"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "0.weight"),
        (lambda: nn.Linear(3, 2, bias=False), "bias"),
        (lambda: nn.Bilinear(3, 3, 2), "size mismatch"),
    ],
)
def test_weights_of_another_model_are_refused(
    checkpoints: Path, other: Callable[[], nn.Module], shown: str
) -> None:
    path = save_checkpoint(checkpoints, nn.Linear(3, 2), {}, Progress())
    model = other()
    message = refusal(lambda: load_weights(path, model), path)
    assert f"does not fit {type(model).__name__}: " in message
    assert shown in message
    assert message.endswith("Resume with the model it was saved from.")


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "progress.json"])
def test_a_damaged_file_is_told(checkpoints: Path, name: str, damage: str) -> None:
    part = Part({"a": torch.arange(100)})
    path = save_checkpoint(checkpoints, nn.Linear(30, 20), {"part": part}, Progress())
    file = path / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            {"empty": b"", "cut": data[: len(data) // 2], "noise": b"\x93" * 400}[damage]
        )
    load: dict[str, Callable[[], object]] = {
        "model.safetensors": lambda: load_weights(path, nn.Linear(30, 20)),
        "state.pt": lambda: load_state(path, {"part": part}),
        "progress.json": lambda: load_progress(path),
    }
    refusal(load[name], path)


@pytest.mark.parametrize("text", ["[]", "3", '{"stpe": 3}', "{"])
def test_progress_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert "cannot be read" in refusal(lambda: load_progress(tmp_path), tmp_path)


def test_state_without_a_part_that_the_run_has_is_refused(checkpoints: Path) -> None:
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {"scaler": None}, Progress())
    message = refusal(lambda: load_state(path, {"scaler": Part({})}), path)
    assert "cannot be restored: KeyError: 'scaler'" in message
    assert message.endswith("Resume with the config it was saved with.")


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    checkpoints: Path, tmp_path: Path, form: str
) -> None:
    marker = tmp_path / "was-run"
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress())
    state = {"random": random_state(), "part": Bomb(marker)}
    if form == "torch":
        torch.save(state, path / "state.pt")
    else:
        (path / "state.pt").write_bytes(pickle.dumps(state))
    refusal(lambda: load_state(path, {"part": Part({})}), path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the planted pickle must be one that acts"


# --- what cannot be written


@pytest.mark.parametrize(
    ("model_size", "state_size"), [(3000, 0), (1, 20000)], ids=["weights", "state"]
)
def test_a_full_disk_leaves_earlier_checkpoints_whole_and_nothing_partial(
    checkpoints: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
    model_size: int,
    state_size: int,
) -> None:
    model, part = nn.Linear(model_size, 1), Part({"a": torch.zeros(state_size)})
    first = save_checkpoint(checkpoints, model, {"part": part}, Progress(step=1))
    with full_disk(10000):
        message = refusal(
            lambda: save_checkpoint(checkpoints, model, {"part": part}, Progress(step=2)),
            checkpoint_path(checkpoints, 2),
        )
    assert "cannot be written: " in message
    assert message.endswith("If the disk is full, free space; earlier checkpoints are whole.")
    assert list(checkpoints.iterdir()) == [first]
    load_weights(first, model)
    load_state(first, {"part": part})


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    message = refusal(
        lambda: save_checkpoint(tmp_path / "checkpoints", nn.Linear(1, 1), {}, Progress()),
        tmp_path / "checkpoints" / "step-000000",
    )
    assert "cannot be written: File exists" in message


def test_a_part_that_cannot_be_saved_leaves_nothing_behind(checkpoints: Path) -> None:
    part = Part({"a": lambda: None})
    message = refusal(
        lambda: save_checkpoint(checkpoints, nn.Linear(1, 1), {"part": part}, Progress()),
        checkpoint_path(checkpoints, 0),
    )
    assert "cannot be written: " in message
    assert list(checkpoints.iterdir()) == []


def test_leftovers_of_a_crash_are_cleared_away(checkpoints: Path) -> None:
    (checkpoints / ".step-000003.partial").mkdir(parents=True)
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4))
    assert list(checkpoints.iterdir()) == [path]


def test_saving_a_step_again_replaces_it(checkpoints: Path) -> None:
    progress = Progress(step=4, epoch=0)
    save_checkpoint(checkpoints, nn.Linear(1, 1), {}, progress)
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, replace(progress, epoch=1))
    assert load_progress(path).epoch == 1
    assert list(checkpoints.iterdir()) == [path]


def test_saving_a_step_again_keeps_the_old_one_until_the_new_one_is_whole(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4, epoch=0))
    seen: list[int] = []
    monkeypatch.setattr(
        "dovetail.run.checkpoint._sync", lambda file: seen.append(load_progress(path).epoch)
    )
    save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4, epoch=1))
    assert seen == [0, 0, 0]
    assert load_progress(path).epoch == 1


def test_a_new_checkpoint_that_cannot_take_its_place_brings_the_old_one_back(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4, epoch=0))
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    refusal(
        lambda: save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4, epoch=1)), path
    )
    assert load_progress(path).epoch == 0
    assert list(checkpoints.iterdir()) == [path]


# --- which there are


def test_last_checkpoint_is_the_one_of_the_highest_step(checkpoints: Path) -> None:
    for step in (999999, 1000000, 20):
        checkpoint_path(checkpoints, step).mkdir(parents=True)
    for name in ("step-best", "step-000020.bak", ".step-2000000.partial", "notes"):
        (checkpoints / name).mkdir()
    assert last_checkpoint(checkpoints.parent).name == "step-1000000"


def test_last_checkpoint_finds_one_that_a_crash_left_moved_aside(checkpoints: Path) -> None:
    path = save_checkpoint(checkpoints, nn.Linear(1, 1), {}, Progress(step=4))
    path.rename(checkpoints / ".step-000004.old")
    assert last_checkpoint(checkpoints.parent) == path
    assert load_progress(path).step == 4


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_run_without_a_checkpoint_is_told(tmp_path: Path, has_folder: bool) -> None:
    if has_folder:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        last_checkpoint(tmp_path)


def test_prune_removes_only_checkpoints_that_are_not_to_be_kept(checkpoints: Path) -> None:
    paths = [checkpoint_path(checkpoints, step) for step in (1, 2, 3)]
    others = [checkpoints / "step-000001-mine", checkpoints / "notes"]
    for path in (*paths, *others):
        path.mkdir(parents=True)
    prune(checkpoints, {paths[1]})
    assert set(checkpoints.iterdir()) == {paths[1], *others}


def test_a_checkpoint_can_be_moved_to_another_place(checkpoints: Path, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = save_checkpoint(checkpoints, model, {}, Progress(step=2))
    moved = Path(shutil.move(path, tmp_path / "kept"))
    other = nn.Linear(3, 2)
    load_weights(moved, other)
    load_state(moved, {})
    assert_same_weights(other, weights_of(model))
    assert json.loads((moved / "progress.json").read_text())["step"] == 2
