"""`dovetail schema`: to the screen or into a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

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
