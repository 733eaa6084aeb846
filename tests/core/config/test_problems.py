from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from dovetail.config import PluginOptions, explain, parse_config


def problems_of(data: dict[Any, Any]) -> list[str]:
    config, problems = parse_config(data)
    assert config is None
    return problems


def problem_of(data: dict[Any, Any]) -> str:
    (problem,) = problems_of(data)
    return problem


def test_wrong_field_reads_as_documented() -> None:
    assert problem_of({"train": {"epochs": 0}}) == (
        "config train.epochs: got 0; expected an integer > 0 (passes over the training split). "
        "Remove the key to use 1."
    )


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("train", "epochs", 2.5, "got 2.5; expected an integer > 0"),
        ("train", "epochs", "many", "got 'many'; expected an integer > 0"),
        ("train", "epochs", True, "got true: a number is expected"),
        ("train", "patience", True, "got true: a number is expected"),
        ("train", "max_steps", 0, "got 0; expected an integer > 0"),
        ("train", "patience", "a", "got 'a'; expected an integer > 0"),
        ("train", "lr", 0, "got 0; expected a number > 0"),
        ("train", "lr", float("nan"), "got nan; expected a finite number"),
        ("train", "weight_decay", float("inf"), "got inf; expected a finite number"),
        ("train", "warmup_ratio", 1, "got 1; expected a number >= 0 and < 1"),
        ("train", "min_lr_ratio", -0.1, "got -0.1; expected a number >= 0 and <= 1"),
        ("train", "schedule", "cosin", "expected 'cosine', 'linear' or 'constant'"),
        ("train", "precision", 16, "got 16; expected 'fp32', 'bf16' or 'fp16'"),
        ("train", "device", "gpu", "expected 'auto', 'cpu', 'cuda', 'cuda:<index>', 'mps'"),
        ("train", "optimizer", "adam", "expected 'adamw' or 'sgd' or an import path"),
        ("train", "loss", 5, "got 5; expected 'task' or 'model' or a string"),
        ("train", "optimizer_kwargs", [], "got [] (list); expected a table"),
        ("model", "factory", "build", "got 'build'; expected an import path 'package.module:obj"),
        ("data", "shuffle", "perhaps", "got 'perhaps'; expected true or false"),
        ("data", "num_workers", -1, "got -1; expected an integer >= 0"),
        ("run", "seed", -1, "got -1; expected an integer >= 0"),
        ("run", "seed", 2**63, "expected an integer >= 0 and < 9223372036854775808"),
        ("run", "dir", 5, "got 5; expected a path"),
        ("run", "name", "a/b", "got 'a/b'; expected letters, digits, '.', '_' and '-'"),
        ("run", "name", "..", "got '..'; expected letters, digits"),
        ("run", "name", "a\n", "expected letters, digits"),
        ("run", "name", "x" * 101, "expected a string with at most 100 characters"),
        ("run", "id", "", "got ''; expected letters, digits"),
        ("run", "plugins", "timer", "got 'timer'; expected a list"),
        ("task", "kind", "cls", "expected 'classification', 'multilabel', 'regression'"),
        ("task", "name", "", "expected a string with at least 1 character"),
        ("compile", "use", None, "got None; expected a string"),
        ("compile", "use", ["a", "b"], "got ['a', 'b'] (list); expected a string"),
        ("log", "use", 5, "got 5; expected a list"),
    ],
)
def test_wrong_value_is_told_with_its_path_and_its_constraint(
    section: str, field: str, value: object, expected: str
) -> None:
    problem = problem_of({section: {field: value}})
    assert problem.startswith(f"config {section}.{field}: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"log": {"use": ["a", 5]}}, "config log.use[1]: got 5; expected a string"),
        (
            {"task": {"inputs": [{"name": "x", "shape": ["batch", 0]}]}},
            "config task.inputs[0].shape[1]: got 0; expected an integer > 0 or a string",
        ),
        (
            {"task": {"inputs": [{"name": "x"}, {"name": "y", "dtype": "half"}]}},
            "config task.inputs[1].dtype: got 'half'; expected 'float32'",
        ),
        ({"task": {"inputs": [{}]}}, "config task.inputs[0].name: nothing given; expected name"),
        ({"train": 5}, "config train: got 5; expected a table"),
        ({"log": "wandb"}, "config log: got 'wandb'; expected a table"),
        ({"accumulate": {"options": 5}}, "config accumulate.options: got 5; expected a table"),
        ({"task": {"labels": ["a"], "num_classes": 2}}, "but labels names 1 classes"),
        ({7: {}}, "config [7]: got 7; expected a name"),
    ],
)
def test_nested_place_is_told_with_its_index(data: dict[Any, Any], expected: str) -> None:
    assert expected in problem_of(data)


def test_a_wrong_item_is_not_advised_away_with_its_whole_list() -> None:
    problem = problem_of({"log": {"use": ["a", 5]}})
    assert problem == "config log.use[1]: got 5; expected a string (backends of the log hook)."


def test_unknown_section_lists_all_and_offers_the_nearest() -> None:
    assert problem_of({"modle": {}}) == (
        "config modle: unknown section (= {} (dict)); expected one of run, model, data, task, "
        "train, distributed, compile, collate, accumulate, log, export. Did you mean 'model'?"
    )


def test_unknown_field_lists_all_and_offers_the_nearest() -> None:
    problem = problem_of({"train": {"epoch": 3}})
    assert problem.startswith("config train.epoch: unknown field (= 3); expected one of epochs,")
    assert problem.endswith("Did you mean 'epochs'?")


def test_option_beside_a_backends_table_is_shown_where_it_belongs() -> None:
    problem = problem_of({"accumulate": {"steps": 4}})
    assert problem == (
        "config accumulate.steps: unknown field (= 4); expected one of use. "
        "Options of a backend go into a table [accumulate.<backend>]."
    )


def test_several_problems_come_together_in_the_order_of_the_fields() -> None:
    data = {"train": {"lr": 0, "epochs": 0}, "run": {"seed": -1}, "export": {"use": [1]}}
    paths = [problem.split(": ")[0] for problem in problems_of(data)]
    assert paths == [
        "config run.seed",
        "config train.epochs",
        "config train.lr",
        "config export.use[0]",
    ]


def test_a_long_value_is_cut() -> None:
    problem = problem_of({"train": {"epochs": "x" * 500}})
    assert len(problem) < 250
    assert "..." in problem


class Inner(PluginOptions):
    width: int = 3
    """Width of it."""


class Other(PluginOptions):
    height: PositiveInt


class Options(PluginOptions):
    by_name: Mapping[str, Inner] = Field(default_factory=dict)
    table_or_number: Inner | int = 1
    either: Inner | Other | None = None
    many: list[Inner] = Field(default_factory=list)
    pair: tuple[int, str] = (1, "a")
    optional: Inner | None = None
    bounded: Annotated[int, Field(gt=0, le=9)] | None = None
    switch: Literal[1, 2] = 1
    flag_or_number: bool | int = 1
    required: int = 0
    """Needed. And more."""

    @field_validator("required")
    @classmethod
    def _refuse_seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("seven is taken")
        if value == 8:
            raise AssertionError("eight too")
        return value

    @model_validator(mode="after")
    def _refuse_both(self) -> Options:
        if self.required == 6 and self.switch == 2:
            raise ValueError("required and switch exclude each other")
        return self


def explain_options(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Options.model_validate(data)
    return explain(caught.value, Options, "config log.mine")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"by_name": {"k": {"width": "q"}}},
            ".by_name.k.width: got 'q'; expected an integer (width",
        ),
        (
            {"by_name": {"k": {"widht": 1}}},
            ".by_name.k.widht: unknown field (= 1); expected one of ",
        ),
        ({"table_or_number": "q"}, ".table_or_number: got 'q'; expected a table or an integer"),
        (
            {"many": [{}, {"width": "q"}]},
            ".many[1].width: got 'q'; expected an integer (width of it)",
        ),
        ({"pair": [1, 2]}, ".pair[1]: got 2; expected a string"),
        ({"pair": ["a", "b"]}, ".pair[0]: got 'a'; expected an integer"),
        (
            {"optional": {"widht": 1}},
            ".optional.widht: unknown field (= 1); expected one of width. Did",
        ),
        ({"bounded": 10}, ".bounded: got 10; expected an integer > 0 and <= 9"),
        ({"switch": 3}, ".switch: got 3; expected 1 or 2"),
        ({"swich": 3}, ".swich: unknown field (= 3); expected one of by_name,"),
        ({"required": 7}, ".required: got 7: seven is taken."),
        ({"required": 8}, ".required: got 8; expected eight too (needed)"),
        (
            {"required": 6, "switch": 2},
            " log.mine: got {'required': 6, 'switch': 2} (dict): required",
        ),
    ],
)
def test_options_of_any_shape_are_told_with_their_path(data: dict[str, Any], expected: str) -> None:
    (problem,) = explain_options(data)
    assert expected in problem
    assert problem.startswith("config log.mine")


def test_branches_of_a_union_of_tables_are_told_without_their_tags() -> None:
    wrong, missing = explain_options({"either": {"width": "q"}})
    assert wrong.startswith("config log.mine.either.width: got 'q'; expected an integer (width of")
    assert missing == "config log.mine.either.height: nothing given. Add the key."


def test_true_stays_a_choice_where_an_option_takes_truth_values() -> None:
    assert Options(flag_or_number=True).flag_or_number is True
