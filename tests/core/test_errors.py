from __future__ import annotations

import inspect

import pytest

from dovetail import errors
from dovetail.errors import (
    CheckpointError,
    ConfigError,
    RunError,
    build_message,
    did_you_mean,
    join_problems,
    rebuild_error,
)


def test_build_message_has_the_documented_shape() -> None:
    message = build_message("config train.lr", "got 0", "a number > 0", "Remove the key.")
    assert message == "config train.lr: got 0; expected a number > 0. Remove the key."


def test_build_message_leaves_out_what_is_empty() -> None:
    assert build_message("file", "is empty") == "file: is empty."
    assert build_message("file", "is empty", action="Fill it.") == "file: is empty. Fill it."


@pytest.mark.parametrize("end", [".", "!", "?"])
def test_build_message_adds_no_second_full_stop(end: str) -> None:
    assert build_message("file", f"is odd{end}", action="Look.") == f"file: is odd{end} Look."


def test_did_you_mean_names_the_nearest_choice() -> None:
    assert did_you_mean("onixx", ["onnx", "torchscript"]) == "Did you mean 'onnx'?"


def test_did_you_mean_is_empty_when_nothing_is_near() -> None:
    assert did_you_mean("wandb", ["onnx", "torchscript"]) == ""
    assert did_you_mean("wandb", []) == ""


def test_join_problems_lists_several_and_leaves_one_alone() -> None:
    assert join_problems("config", ["one"]) == "one"
    assert join_problems("config", ["one", "two"]) == "config: 2 problems\n  - one\n  - two"


def test_config_error_keeps_single_problems() -> None:
    assert ConfigError("a and b", ["a", "b"]).problems == ("a", "b")
    assert ConfigError("only").problems == ("only",)


@pytest.mark.parametrize("text", ["", "stop"])
def test_rebuild_error_keeps_class_and_text_of_ours_and_names_where_others_came_from(
    text: str,
) -> None:
    assert type(rebuild_error("CheckpointError", text, "rank 0", RunError)) is CheckpointError
    assert str(rebuild_error("CheckpointError", text, "rank 0", RunError)) == text
    for kind in ("KeyboardInterrupt", "build_message"):
        error = rebuild_error(kind, text, "rank 0", RunError)
        assert type(error) is RunError
        assert str(error) == f"rank 0: {kind}: {text}." if text else f"rank 0: {kind}."


def test_every_error_has_the_common_base_and_a_docstring() -> None:
    classes = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
    ]
    assert len(classes) > 10
    for kind in classes:
        assert issubclass(kind, errors.DovetailError | Warning)
        assert kind.__doc__


@pytest.mark.parametrize(
    "kind",
    ["ConfigError", "UnknownPluginError", "PluginConflictError", "DataError", "ModelError"],
)
def test_errors_about_values_are_value_errors_as_users_catch_them(kind: str) -> None:
    assert issubclass(getattr(errors, kind), ValueError)
