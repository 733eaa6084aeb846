"""The group of commands: its help, its start-up, and names nobody knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import Result

from dovetail import __version__
from dovetail.cli._group import COMMANDS, cli
from dovetail.cli.plugins import SUBCOMMANDS

HEAVY = {"torch", "numpy", "pydantic", "onnx", "wandb", "torchvision", "tensorboard", "rich"}


def test_help_lists_every_command_with_its_line(run_cli: Callable[..., Result]) -> None:
    output = run_cli("--help").output
    for name, (_, line) in COMMANDS.items():
        assert f"  {name.ljust(7)}  {line}" in output


def test_help_explains_every_exit_status(run_cli: Callable[..., Result]) -> None:
    output = run_cli("--help").output
    for status in ("0    done", "1    the run failed", "2    the config", "130  interrupted"):
        assert f"\n    {status}" in output


def test_help_fits_eighty_columns(run_cli: Callable[..., Result]) -> None:
    nested = (("plugins", name) for name in SUBCOMMANDS)
    for command in ((), *((name,) for name in COMMANDS), *nested):
        result = run_cli(*command, "--help")
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_line_is_what_the_command_says_of_itself(name: str) -> None:
    with click.Context(cli) as context:
        command = cli.get_command(context, name)
    assert command is not None
    assert command.get_short_help_str(100) == COMMANDS[name][1]


def test_group_prints_help_when_nothing_is_given(run_cli: Callable[..., Result]) -> None:
    result = run_cli()
    assert result.exit_code == 0
    assert result.stdout == run_cli("--help").stdout


@pytest.mark.parametrize("arguments", [(), ("--debug",)])
def test_group_refuses_an_unknown_command_and_names_the_nearest(
    run_cli: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = run_cli(*arguments, "trian")
    assert result.exit_code == 2
    assert "error: There is no command 'trian'. Did you mean 'train'?" in result.stderr
    assert result.stdout == ""


def test_group_lists_the_commands_when_none_is_near(run_cli: Callable[..., Result]) -> None:
    assert f"The commands are: {', '.join(COMMANDS)}." in run_cli("xyz").stderr


def test_group_refuses_an_unknown_option(run_cli: Callable[..., Result]) -> None:
    result = run_cli("plugins", "--jsno")
    assert result.exit_code == 2
    assert "error: No such option" in result.stderr
    assert "Help: dovetail plugins --help" in result.stderr


def test_version_option_prints_name_and_version(run_cli: Callable[..., Result]) -> None:
    assert run_cli("--version").stdout == f"dovetail {__version__}\n"


def test_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "dovetail", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"dovetail {__version__}\n"


@pytest.mark.parametrize(
    "command", ["--help", "plugins", "plugins collate --json", "plugins --help", "version"]
)
def test_command_imports_nothing_heavy_and_no_plugin(command: str) -> None:
    code = (
        "import sys\n"
        "from dovetail.cli import main\n"
        "try:\n"
        f"    main({command.split()!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(ended.stderr.split())
    assert {"click", "dovetail"} <= imported
    assert not imported & {*HEAVY, "dovetail_plugins"}


def test_completion_knows_the_commands() -> None:
    code = "from dovetail.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "_DOVETAIL_COMPLETE": "bash_complete",
            "COMP_WORDS": "dovetail pl",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "plain,plugins\n"
