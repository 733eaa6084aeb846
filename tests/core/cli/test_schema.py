"""`dovetail schema`: to the screen or into a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from jsonschema import Draft202012Validator

from dovetail.schema import build_schema


def test_schema_is_printed_as_json(run_cli: Callable[..., Result]) -> None:
    result = run_cli("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == build_schema()


def test_schema_is_written_to_a_file(run_cli: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "config.schema.json"
    result = run_cli("schema", "--output", str(path))
    assert result.stdout == f"wrote {path}\n"
    assert json.loads(path.read_text())["title"] == "Config of a dovetail run"


def test_schema_fails_when_the_file_cannot_be_written(
    run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    result = run_cli("schema", "-o", str(tmp_path / "no" / "folder.json"))
    assert result.exit_code == 2
    assert "cannot be written: No such file or directory." in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "directive"),
    [
        ("my.toml", "# mine\n[run]\n", "  #:schema ./dovetail.schema.json"),
        ("my.json", "{}", '  "$schema": "./dovetail.schema.json",'),
    ],
)
def test_schema_lies_beside_the_config_and_says_which_line_it_needs(
    run_cli: Callable[..., Result], tmp_path: Path, name: str, text: str, directive: str
) -> None:
    config = tmp_path / name
    config.write_text(text)
    result = run_cli("schema", "--write", str(config))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'dovetail.schema.json'}"
    assert lines[1].startswith("So that editors use it, make this the first ")
    assert lines[2] == directive
    assert json.loads((tmp_path / "dovetail.schema.json").read_text()) == build_schema()
    assert config.read_text() == text


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.toml", "# mine\n\n#:schema ./dovetail.schema.json\n", "names it; editors use it."),
        ("a.toml", "#:schema old.json\n", "in place of 'old.json':"),
        ("a.toml", "[run]\n#:schema ./dovetail.schema.json\n", "make this the first line of"),
        ("a.json", '{"$schema": "dovetail.schema.json"}', "names it; editors use it."),
        ("a.json", '{"$schema": 3}', "make this the first key of"),
    ],
)
def test_schema_tells_whether_the_config_names_it(
    run_cli: Callable[..., Result], tmp_path: Path, name: str, text: str, told: str
) -> None:
    config = tmp_path / name
    config.write_text(text)
    assert told in run_cli("schema", "--write", str(config)).stdout


def test_schema_is_written_into_the_working_directory_without_a_config(
    run_cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_cli("schema", "--write")
    assert (tmp_path / "dovetail.schema.json").is_file()
    assert "  TOML, first line  #:schema ./dovetail.schema.json" in result.stdout.splitlines()


def test_schema_may_be_written_elsewhere_and_is_named_from_the_config(
    run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    config = tmp_path / "folder" / "a.toml"
    config.parent.mkdir()
    config.write_text("")
    result = run_cli("schema", "--write", str(config), "-o", str(tmp_path / "s.json"))
    assert f"  #:schema {(tmp_path / 's.json').as_posix()}" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.toml",), "add --write."),
        (("--write", "absent.toml"), "config file 'absent.toml': not found"),
    ],
)
def test_schema_refuses_a_config_it_cannot_lie_beside(
    run_cli: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli("schema", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_schema_takes_the_line_that_it_asks_a_json_config_for() -> None:
    validator = Draft202012Validator(build_schema())
    assert validator.is_valid({"$schema": "./dovetail.schema.json", "run": {"name": "a"}})
    assert not validator.is_valid({"$schema": 3})


def test_schema_leaves_out_who_is_kept_out(
    run_cli: Callable[..., Result], install: Callable[..., Path]
) -> None:
    install("other-tools", {"log": ("other",)}, "raise RuntimeError('imported')")
    assert '"other"' in run_cli("schema").stdout
    assert '"other"' not in run_cli("schema", "--no-autoload").stdout
