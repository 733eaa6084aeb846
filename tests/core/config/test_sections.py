from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dovetail._markers import HOOKS
from dovetail.config import (
    ConfigPath,
    HookSection,
    PluginOptions,
    TrainingConfig,
    apply_overrides,
    parse_config,
    read_config_file,
)
from dovetail.errors import ConfigError

SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in TrainingConfig.model_fields.items()
}


def build(data: dict[str, Any]) -> TrainingConfig:
    config, problems = parse_config(data)
    assert config is not None, problems
    return config


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_and_every_field_has_help(section: str) -> None:
    model = SECTIONS[section]
    assert inspect.getdoc(model) != inspect.getdoc(BaseModel)
    for name, field in model.model_fields.items():
        assert field.description, f"{section}.{name} has no help"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_frozen_and_closed(section: str) -> None:
    model = SECTIONS[section]
    part = getattr(TrainingConfig(), section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, next(iter(model.model_fields)), "other")
    with pytest.raises(ValidationError, match="Extra inputs"):
        model.model_validate({"nosuch": 1})


def test_the_config_itself_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainingConfig().run = TrainingConfig().run  # type: ignore[misc]


def test_every_hook_has_a_section() -> None:
    assert TrainingConfig.HOOK_SECTIONS == HOOKS
    for hook in HOOKS:
        assert isinstance(TrainingConfig().hook_section(hook), HookSection)


def test_defaults_name_no_backend_but_the_accumulator() -> None:
    names = {hook: TrainingConfig().hook_section(hook).names for hook in HOOKS}
    assert names == {
        "compile": (),
        "collate": (),
        "accumulate": ("exact",),
        "log": (),
        "export": (),
    }


def test_hook_section_gathers_tables_as_options_of_backends() -> None:
    config = build({"log": {"use": "wandb", "wandb": {"project": "p"}, "asleep": {"a": 1}}})
    assert config.log.use == ("wandb",)
    assert config.log.options == {"wandb": {"project": "p"}, "asleep": {"a": 1}}


@pytest.mark.parametrize(
    ("use", "names"),
    [("off", ()), ("auto", ()), ("mine", ("mine",)), ("dist:mine", ("dist:mine",))],
)
def test_hook_section_names_are_those_of_backends(use: str, names: tuple[str, ...]) -> None:
    assert build({"compile": {"use": use}}).compile.names == names


def test_to_dict_writes_options_as_tables_and_leaves_out_what_is_none() -> None:
    config = build({"log": {"use": ["a"], "a": {"x": 1}}, "train": {"patience": None}})
    plain = config.to_dict()
    assert (plain["log"]["use"], plain["log"]["a"]) == (["a"], {"x": 1})
    assert "calls_per_s" not in plain["log"]
    assert "patience" not in plain["train"]
    assert "id" not in plain["run"]


def test_to_dict_writes_paths_dates_and_tuples_as_plain_values() -> None:
    options = {"path": Path("a") / "b", "sizes": (1, 2)}
    config = build({"export": {"onnx": options}, "model": {"kwargs": options}})
    plain = config.to_dict()
    assert plain["export"]["onnx"] == {"path": str(Path("a/b")), "sizes": [1, 2]}
    assert plain["model"]["kwargs"] == plain["export"]["onnx"]


@pytest.mark.parametrize(
    "data", [{"model": {"kwargs": {"f": object()}}}, {"log": {"mine": {"f": object()}}}]
)
def test_to_dict_refuses_what_no_file_can_hold(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config: .*expected numbers, strings, lists and tables"):
        build(data).to_dict()


def test_to_dict_keeps_an_argument_that_is_not_finite() -> None:
    plain = build({"model": {"kwargs": {"fill": math.inf}}}).to_dict()
    assert plain["model"]["kwargs"] == {"fill": math.inf}


def test_to_flat_dict_has_dotted_names() -> None:
    config = build({"accumulate": {"exact": {"steps": 4}}, "model": {"kwargs": {"a": {"b": 1}}}})
    flat = config.to_flat_dict()
    assert flat["accumulate.exact.steps"] == 4
    assert flat["model.kwargs.a.b"] == 1
    assert flat["train.optimizer_kwargs"] == {}
    assert flat["run.name"] == "run"


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
tables = st.dictionaries(texts, values, max_size=3)
configs = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries(
            {"name": names, "seed": st.integers(0, 2**63 - 1)},
            optional={"id": names, "plugins": st.lists(texts, max_size=2)},
        ),
        "model": st.fixed_dictionaries({"kwargs": tables}),
        "task": st.fixed_dictionaries(
            {"name": texts.filter(bool), "labels": st.lists(texts, max_size=3)},
        ),
        "train": st.fixed_dictionaries(
            {
                "lr": st.floats(1e-300, 1e300),
                "epochs": st.integers(1, 10**9),
                "warmup_ratio": st.floats(0, 1, exclude_max=True),
                "optimizer": st.sampled_from(["sgd", "torch.optim:RMSprop"]),
                "optimizer_kwargs": tables,
            },
            optional={"patience": st.integers(1, 99)},
        ),
        "log": st.fixed_dictionaries(
            {"use": st.lists(names, max_size=2)},
            optional={"tensorboard": tables},
        ),
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs)
def test_config_survives_its_toml_file(tmp_path: Path, data: dict[str, Any]) -> None:
    config = build(data)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
    assert build(read_config_file(path)) == config


def test_overridden_config_equals_the_one_that_says_so_itself() -> None:
    overrides = ["train.lr=0.5", "log.use=tensorboard", "accumulate.exact.steps=4", "run.dir=./out"]
    said = {
        "train": {"lr": 0.5},
        "log": {"use": ["tensorboard"]},
        "accumulate": {"exact": {"steps": 4}},
        "run": {"dir": "./out"},
    }
    assert build(apply_overrides({}, overrides)) == build(said)


class FileOptions(PluginOptions):
    path: ConfigPath


def test_config_path_is_meant_from_the_folder_of_the_config(tmp_path: Path) -> None:
    context = {"config_dir": tmp_path}
    made = FileOptions.model_validate({"path": "a/b"}, context=context)
    assert made.path == tmp_path / "a" / "b"
    absolute = FileOptions.model_validate({"path": str(tmp_path)}, context={"config_dir": "/other"})
    assert absolute.path == tmp_path
    assert FileOptions.model_validate({"path": "a"}).path == Path("a")


def test_plugin_options_are_frozen_and_refuse_every_option_they_lack() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FileOptions(path=Path("a")).path = Path("b")  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        PluginOptions.model_validate({"anything": 1})
