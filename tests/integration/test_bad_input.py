"""What users get wrong: each ends in one clear message, and nothing half-written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dovetail
from dovetail.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    RunError,
    UnknownPluginError,
)
from dovetail.registry import Registry

Samples = list[tuple[torch.Tensor, int]]


@pytest.fixture
def refuse(
    config: dict[str, Any], registry: Registry, splits: dict[str, Samples], tmp_path: Path
) -> Callable[..., str]:
    """Train with something wrong; return the message, and see that nothing was written."""

    def run(kind: type[Exception], *overrides: str, **kwargs: Any) -> str:
        arguments = {"model": nn.Linear(6, 2), "data": splits, "registry": registry, **kwargs}
        with pytest.raises(kind) as caught:
            dovetail.train(arguments.pop("config", config), overrides, **arguments)
        assert not list((tmp_path / "runs").rglob("*.jsonl"))
        assert not list((tmp_path / "runs").rglob("config.toml"))
        return str(caught.value)

    return run


Refuse = Callable[..., str]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are imported from, which nobody imported before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def test_unknown_section_field_and_backend_come_in_one_message(refuse: Refuse) -> None:
    message = refuse(
        ConfigError, "trian.lr=1", "train.batchsize=4", "accumulate.use=exakt", "export.use=onix"
    )
    assert "config trian: unknown section" in message
    assert "config train.batchsize: unknown field" in message
    assert "Did you mean 'batch_size'?" in message
    assert "config accumulate.use: no plugin is called 'exakt'" in message
    assert "Did you mean 'exact'?" in message
    assert "config export.use: no plugin is called 'onix'" in message


def test_option_of_the_wrong_type_names_path_bound_and_meaning(refuse: Refuse) -> None:
    message = refuse(ConfigError, "accumulate.exact.steps=0", "train.lr=-1")
    assert (
        "config accumulate.exact.steps: got 0; expected an integer >= 1 or a table "
        "(micro-batches per optimizer step; a table `{ 0 = 1, 1000 = 4 }` sets them from a step "
        "on). Remove the key to use 1." in message
    )
    assert "config train.lr: got -1" in message


def test_option_of_an_unknown_backend_is_refused(refuse: Refuse) -> None:
    message = refuse(ConfigError, "export.onx.opset=20")
    assert "config export.onx" in message
    assert "Did you mean 'onnx'?" in message


def test_missing_extra_prints_the_install_line(refuse: Refuse, own_folder: Path) -> None:
    # A module that is not there, for the process of the trackers too.
    (own_folder / "tensorboard.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tensorboard'\", name='tensorboard')\n"
    )
    message = refuse(MissingDependencyError, "log.use=tensorboard")
    assert 'pip install "dovetail[tensorboard]"' in message


@pytest.mark.parametrize(
    ("source", "factory", "expected"),
    [
        ("", "absent_module:build", "there is no module 'absent_module'"),
        ("import absent_library", "own:build", "needs the package 'absent_library'"),
        ("raise ValueError('broken here')", "own:build", "ValueError: broken here"),
        ("def built(): ...", "own:build", "Did you mean 'built'?"),
        ("build = 3", "own:build", "is a int; expected a function or a class"),
        ("def build(): return 3", "own:build", "gave a int; expected a torch.nn.Module"),
        ("def build(width): ...", "own:build", "missing a required argument: 'width'"),
    ],
)
def test_model_factory_that_does_not_work_says_why(
    refuse: Refuse, own_folder: Path, source: str, factory: str, expected: str
) -> None:
    (own_folder / "own.py").write_text(source)
    message = refuse(ConfigError, f"model.factory={factory}", model=None)
    assert "config model" in message
    assert expected in message


def test_no_model_and_no_data_say_what_to_write(refuse: Refuse) -> None:
    assert "factory = " in refuse(ConfigError, model=None)
    assert "config data.factory: nothing given" in refuse(ConfigError, data=None)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], "split 'train': is empty"),
        ({"train": [], "validation": []}, "split 'train': is empty"),
        ({"training": [1]}, "expected a split 'train'"),
        ({"train": [1], "holdout": [1]}, "'holdout'"),
        (3, "is a int"),
        ([7, 8], "is a int; expected a mapping, or a tuple (features, labels)"),
    ],
)
def test_data_of_the_wrong_form_say_what_was_found(
    refuse: Refuse, data: Any, expected: str
) -> None:
    assert expected in refuse(DataError, data=data)


def test_batch_whose_shapes_disagree_is_refused(refuse: Refuse, splits: dict[str, Samples]) -> None:
    uneven = [(torch.zeros(6 + i % 2), y) for i, (_, y) in enumerate(splits["train"])]
    message = refuse(DataError, data=uneven, registry=Registry())
    assert "collator 'tabular' samples[...]['features']: shapes (6,), (7,) in one batch" in message


def test_labels_outside_the_classes_name_the_range(
    refuse: Refuse, splits: dict[str, Samples]
) -> None:
    wrong = [(x, 5) for x, _ in splits["train"]]
    message = refuse(DataError, data=wrong)
    assert "labels: run from 5 to 5; expected 0 to 1, as the model has 2 outputs" in message


def test_output_that_does_not_fit_the_loss_names_both_shapes(refuse: Refuse) -> None:
    message = refuse(ModelError, "task.kind=regression")
    assert "output (8, 2), labels (8,)" in message


def test_output_that_does_not_fit_the_task_names_both_sizes(refuse: Refuse) -> None:
    message = refuse(ModelError, "task.num_classes=3")
    assert "has the shape (8, 2); expected (batch, 3), as the task has 3 classes" in message


def test_model_that_does_not_take_the_batch_is_named(
    refuse: Refuse, splits: dict[str, Samples]
) -> None:
    class TwoInputs(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    assert "model TwoInputs.forward: requires left, right" in refuse(ModelError, model=TwoInputs())
    message = refuse(ModelError, model=nn.Linear(5, 2))
    assert "model Linear: fails on the first batch (features (8, 6)" in message


def test_model_without_parameters_has_nothing_to_train(refuse: Refuse) -> None:
    class Fixed(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, :2]

    assert "no parameter that requires a gradient" in refuse(ConfigError, model=Fixed())


def test_config_file_that_cannot_be_read_says_why(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "right.toml").write_text("")
    assert "Beside it: right.toml" in refuse(ConfigError, config=tmp_path / "wrong.toml")
    assert "is a folder" in refuse(ConfigError, config=tmp_path)
    (tmp_path / "latin.toml").write_bytes("# für".encode("latin-1"))
    assert "is not UTF-8 (byte 0xfc at offset 3)" in refuse(
        ConfigError, config=tmp_path / "latin.toml"
    )
    (tmp_path / "no.toml").write_text("[run]\nname = digits\n")
    assert "is not TOML: " in refuse(ConfigError, config=tmp_path / "no.toml")
    assert "line 2" in refuse(ConfigError, config=tmp_path / "no.toml")


def test_run_folder_that_exists_is_never_overwritten(
    config: dict[str, Any], registry: Registry, splits: dict[str, Samples], tmp_path: Path
) -> None:
    taken = tmp_path / "runs" / "small" / "first"
    taken.mkdir(parents=True)
    (taken / "keep").write_text("mine")
    with pytest.raises(RunError, match="exists already") as caught:
        dovetail.train(
            config, ["run.id=first"], model=nn.Linear(6, 2), data=splits, registry=registry
        )
    assert "Choose another run.id" in str(caught.value)
    assert [p.name for p in taken.iterdir()] == ["keep"]


def test_run_folder_that_cannot_be_made_says_why(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    message = refuse(RunError, f"run.dir={tmp_path / 'occupied'}")
    assert "cannot be made: Not a directory" in message
    assert "Choose another run.dir" in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk_at_the_start_leaves_no_folder(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def write_to_full_disk(self: Path, data: str, **kwargs: Any) -> int:
        # The kernel's own "no space left on device", not one made up here.
        return real(Path("/dev/full") if self.name == "config.toml" else self, data, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_to_full_disk)
    message = refuse(RunError)
    assert "No space left on device" in message
    assert not list((tmp_path / "runs" / "small").iterdir())


def test_early_stopping_without_validation_is_refused(
    refuse: Refuse, splits: dict[str, Samples]
) -> None:
    message = refuse(ConfigError, "train.patience=2", data=splits["train"])
    assert "the data have no validation split" in message


def test_monitor_that_does_not_exist_is_refused_before_training(refuse: Refuse) -> None:
    message = refuse(ConfigError, "train.monitor=val/acuracy")
    assert "there is no metric 'val/acuracy'" in message
    assert "Did you mean 'val/accuracy'?" in message


def test_one_loader_and_one_data_set_are_refused(
    refuse: Refuse, splits: dict[str, Samples]
) -> None:
    message = refuse(DataError, data=(DataLoader(splits["train"]), splits["validation"]))
    assert "one split is a DataLoader" in message


def test_device_that_is_not_there_is_refused(refuse: Refuse) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert "'cuda' is not available" in refuse(ConfigError, "train.device=cuda")


def test_modality_nobody_claims_lists_the_collators(refuse: Refuse) -> None:
    message = refuse(UnknownPluginError, "task.modality=seismic")
    assert "Unsupported modality: seismic" in message
    assert "tabular" in message
