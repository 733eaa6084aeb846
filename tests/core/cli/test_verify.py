"""`dovetail verify`: a bundle that agrees, one that does not, and one that was changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def bundle(exporting_project: Any, run_cli: Run) -> Path:
    result = run_cli("train", "tiny.toml", "export.use=npz", "run.id=one", "-q")
    assert result.exit_code == 0, result.output
    return Path("runs/tiny/one/bundle")


def test_verify_tells_the_error_of_each_format_and_fails_when_one_disagrees(
    bundle: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_cli("verify", str(bundle))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split("  ")[0] == "FORMAT"
    assert lines[1].split()[:5] == ["npz", "1,", "2,", "3,", "8"]
    assert lines[1].split()[-1] == "ok"
    assert lines[-1] == f"verified: {bundle}"

    monkeypatch.setenv("PLANTED_ERROR", "0.01")
    result = run_cli("verify", str(bundle), "--format", "npz")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[1].split()[-1] == "FAILED"
    assert lines[3].startswith("npz: at batch 1: differs from the trained model by ")
    assert lines[-1] == f"NOT verified: {bundle}"


def test_verify_refuses_a_changed_file_and_an_unknown_format(bundle: Path, run_cli: Run) -> None:
    result = run_cli("verify", str(bundle), "--format", "nzp")
    assert result.exit_code != 0
    assert "Did you mean 'npz'?" in result.stderr
    with (bundle / "README.md").open("a") as file:
        file.write("changed")
    result = run_cli("verify", str(bundle))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: README.md: ")
    assert result.stdout == ""


def test_verify_refuses_what_is_no_bundle(run_cli: Run, tmp_path: Path) -> None:
    result = run_cli("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
