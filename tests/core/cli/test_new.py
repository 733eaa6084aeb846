"""`dovetail plugins new`: what it writes and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dovetail.cli._new import new
from dovetail.errors import ConfigError

SAID = """\
wrote dovetail-scaled, a plugin of the collate hook:
  .github/workflows/ci.yml
  .gitignore
  README.md
  pyproject.toml
  src/dovetail_scaled/__init__.py
  src/dovetail_scaled/py.typed
  tests/test_conformance.py
  tests/test_scaled.py
  tox.ini

It works as it is. To install and test it:
  cd dovetail-scaled
  pip install --editable . --group test   # pip 25.1 or newer
  pytest
  dovetail plugins show scaled

To use it, in a config:
  [collate]
  use = "scaled"

  [collate.scaled]
  factor = 0.5
"""


def run_new(*arguments: str) -> Result:
    return CliRunner().invoke(new, arguments)


def test_new_writes_a_plugin_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_new("dovetail-scaled", "--hook", "collate")
    assert (result.exit_code, result.stdout) == (0, SAID)
    said = [line.strip() for line in SAID.partition("\n\n")[0].splitlines()[1:]]
    found = (p for p in (tmp_path / "dovetail-scaled").rglob("*") if p.is_file())
    assert said == sorted(p.relative_to(tmp_path / "dovetail-scaled").as_posix() for p in found)


def test_new_writes_into_the_folder_that_is_named(tmp_path: Path) -> None:
    result = run_new("timed", "--hook", "wrap", "--output", str(tmp_path))
    assert result.exit_code == 0
    assert f"wrote {tmp_path / 'dovetail-timed'}, a plugin around hooks:\n" in result.stdout
    assert f"  cd {tmp_path / 'dovetail-timed'}\n" in result.stdout
    assert (tmp_path / "dovetail-timed" / "pyproject.toml").is_file()


def test_new_without_a_hook_names_the_hooks(tmp_path: Path) -> None:
    result = run_new("scaled", "--output", str(tmp_path))
    assert result.exit_code == 2
    hooks = "compile, collate, accumulate, log, export, wrap"
    assert f"Missing option '--hook'. It is one of {hooks}." in result.stderr


def test_new_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = run_new("scaled", "--hook", "log", "-o", str(tmp_path / "absent"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_new_says_nothing_of_what_was_not_written(tmp_path: Path) -> None:
    result = run_new("Scaled", "--hook", "log", "--output", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert not result.stdout
    assert not list(tmp_path.iterdir())
