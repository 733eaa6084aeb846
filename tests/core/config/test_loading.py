from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.config import apply_overrides, parse_config, read_config_file
from dovetail.errors import ConfigError


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config_file(path)
    message = str(caught.value)
    assert message.startswith(f"config file {str(path)!r}: ")
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_read_config_file_returns_plain_tables(file: Path) -> None:
    file.write_text('[run]\nname = "zähler"\n[train]\nlr = 3e-4\n', encoding="utf-8")
    assert read_config_file(file) == {"run": {"name": "zähler"}, "train": {"lr": 3e-4}}


def test_read_config_file_reads_json_by_its_ending(tmp_path: Path) -> None:
    path = tmp_path / "config.JSON"
    path.write_text(json.dumps({"train": {"epochs": 3}}), encoding="utf-8")
    assert read_config_file(path) == {"train": {"epochs": 3}}


def test_read_config_file_takes_an_empty_file_for_all_defaults(file: Path) -> None:
    file.write_bytes(b"")
    assert read_config_file(file) == {}
    assert parse_config({})[0] is not None


@pytest.mark.parametrize(
    "data",
    [
        b'[run]\r\nname = "a"\r\n',
        b'\xef\xbb\xbf[run]\nname = "a"\n',
        b'\xef\xbb\xbf[run]\r\nname = "a"',
    ],
    ids=["crlf", "byte-order mark", "both"],
)
def test_read_config_file_reads_what_windows_editors_write(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert read_config_file(file) == {"run": {"name": "a"}}


def test_read_config_file_lists_what_lies_beside_a_missing_file(tmp_path: Path) -> None:
    for name in ("digits.toml", "audio.toml", "notes.txt"):
        (tmp_path / name).touch()
    message = refusal(tmp_path / "digit.toml")
    assert "not found" in message
    assert message.endswith("Beside it: audio.toml, digits.toml.")


def test_read_config_file_says_not_found_when_nothing_is_beside(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.toml").endswith("Check the path.")
    assert refusal(tmp_path / "nosuch" / "a.toml").endswith("Check the path.")


def test_read_config_file_refuses_a_folder(tmp_path: Path) -> None:
    assert "is a folder; expected a file. Name the file in it." in refusal(tmp_path)


def test_read_config_file_refuses_a_file_used_as_a_folder(file: Path) -> None:
    file.touch()
    assert "cannot be read: Not a directory" in refusal(file / "inner.toml")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_read_config_file_refuses_an_unreadable_file(file: Path) -> None:
    file.touch(mode=0)
    assert "cannot be read: Permission denied" in refusal(file)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"name = '\xe9'", "byte 0xe9 at offset 8"),
        ("[run]".encode("utf-16"), "byte 0xff at offset 0"),
    ],
    ids=["latin-1", "utf-16"],
)
def test_read_config_file_names_the_byte_that_is_no_utf_8(
    file: Path, data: bytes, place: str
) -> None:
    file.write_bytes(data)
    message = refusal(file)
    assert f"is not UTF-8 ({place})" in message
    assert message.endswith("Save the file as UTF-8.")


def test_read_config_file_names_the_line_that_is_no_toml(file: Path) -> None:
    file.write_text("[run]\nname = oops\n")
    message = refusal(file)
    assert "is not TOML" in message
    assert "line 2, column 8" in message


@pytest.mark.parametrize("text", ["[run]\n[run]\n", "a = 1\na = 2\n", "[run\n", "run: x\n"])
def test_read_config_file_refuses_toml_with_mistakes(file: Path, text: str) -> None:
    file.write_text(text)
    assert "is not TOML" in refusal(file)


def test_read_config_file_names_the_line_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "run": {,}\n}')
    message = refusal(path)
    assert "is not JSON" in message
    assert "line 2, column 11" in message


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_read_config_file_refuses_json_that_is_no_object(
    tmp_path: Path, text: str, kind: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert f"holds a {kind}" in refusal(path)


def set_one(override: str) -> Any:
    return apply_overrides({}, [override])["a"]["b"]


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        (" true ", True),
        ("inf", float("inf")),
        ('"x y"', "x y"),
        ("'single'", "single"),
        ('["a", "b"]', ["a", "b"]),
        ("{c = 1}", {"c": 1}),
        ('"a=b"', "a=b"),
    ],
)
def test_override_reads_toml_values(raw: str, value: object) -> None:
    assert set_one(f"a.b={raw}") == value


@pytest.mark.parametrize(
    "word",
    [
        "sgd",
        "torch.optim:Adam",
        "./runs",
        "/tmp/runs-2",
        "~/data",
        "../up",
        "cuda:1",
        "größe",
        "дом",
    ],
)
def test_override_takes_bare_words_and_paths_as_text(word: str) -> None:
    assert set_one(f"a.b={word}") == word


@pytest.mark.parametrize("raw", ["", "a b", "[a, b]", "007", "3 4", '"open', "1\nc = 2", "1\n[x]"])
def test_override_advises_quotes_when_the_value_is_no_toml(raw: str) -> None:
    with pytest.raises(ConfigError) as caught:
        set_one(f"a.b={raw}")
    message = str(caught.value)
    assert message.startswith(f"override a.b: got {raw!r}; expected a TOML value")
    assert "Quote it for the shell" in message


@pytest.mark.parametrize("override", ["", "=3", "train.lr", "train..lr=3", ".lr=3", "a b=3", "ä=3"])
def test_override_without_a_path_or_a_value_is_no_setting(override: str) -> None:
    with pytest.raises(ConfigError, match="is no setting; expected section") as caught:
        apply_overrides({}, [override])
    assert repr(override) in str(caught.value)


def test_overrides_tell_every_mistake_at_once() -> None:
    overrides = ["train.lr", "ok.key=1", "a.b=x y", "c.d.e=1"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"c": {"d": 5}}, overrides)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("overrides: 3 problems\n  - ")


def test_override_says_what_stands_in_the_way_of_a_table() -> None:
    data = {"train": {"lr": 0.1}, "task": {"inputs": [{"name": "x"}]}}
    with pytest.raises(ConfigError) as caught:
        apply_overrides(data, ["train.lr.x=3", "task.inputs.name=y"])
    assert caught.value.problems == (
        "override train.lr.x: train.lr is 0.1; expected a table.",
        "override task.inputs.name: task.inputs is [{'name': 'x'}]; expected a table.",
    )


def test_later_overrides_win_and_the_input_stays_as_it_was() -> None:
    data = {"train": {"lr": 0.1, "epochs": 2}}
    result = apply_overrides(data, ["train.lr=0.2", "train.lr=0.3", "log.use=[]"])
    assert result == {"train": {"lr": 0.3, "epochs": 2}, "log": {"use": []}}
    assert data == {"train": {"lr": 0.1, "epochs": 2}}


def test_a_single_override_need_not_be_in_a_list() -> None:
    assert apply_overrides({}, "train.lr=0.2") == {"train": {"lr": 0.2}}


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_override_reads_back_whatever_toml_writes(value: object) -> None:
    import tomli_w

    written = tomli_w.dumps({"v": value}).partition("=")[2].strip()
    assert set_one(f"a.b={written}") == value


def test_parse_config_returns_the_config_or_all_problems() -> None:
    config, problems = parse_config({"train": {"epochs": 3}})
    assert config is not None
    assert config.train.epochs == 3
    assert problems == []
    config, problems = parse_config({"train": {"epochs": 0, "lr": -1}, "rum": {}})
    assert config is None
    assert [problem.split(":")[0] for problem in problems] == [
        "config train.epochs",
        "config train.lr",
        "config rum",
    ]


def test_read_config_file_lets_json_name_its_schema_for_editors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"$schema": "./dovetail.schema.json", "run": {"name": "digits"}}')
    assert read_config_file(path) == {"run": {"name": "digits"}}
