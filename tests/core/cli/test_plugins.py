"""`dovetail plugins`: the list that imports nothing, and the details that do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from dovetail.cli.plugins import SUBCOMMANDS, plugins

pytestmark = pytest.mark.usefixtures("light_probe")

Install = Callable[..., Path]
Run = Callable[..., Result]

NUMBERS = itertools.count()
EXPLODES = "raise RuntimeError('imported, though nobody asked for it')"

COLLATOR = '''
"""Collates nothing, slowly."""
from typing import Literal

from pydantic import Field

from dovetail import PluginOptions, hookimpl


class Options(PluginOptions):
    size: int = Field(8, ge=1, le=64)
    """Items of a window."""
    mode: Literal["fast", "slow"] | None = None
    """How it goes about it."""
    weights: tuple[float, ...]
    """One per class."""


@hookimpl
def dovetail_collate(task, options: Options):
    return None
'''

TRACKER = '''
"""Tracks nothing."""
from dovetail import hookimpl


@hookimpl
def dovetail_log(run):
    return None
'''

WRAPPER = '''
"""Times every export."""
from dovetail import hookimpl


@hookimpl(wrapper=True)
def dovetail_export(task, options):
    return (yield)
'''


def row_of(result: Result, name: str) -> list[str]:
    """Return the cells of the row of a plugin."""
    rows = [line.split(maxsplit=4) for line in result.stdout.splitlines()]
    (row,) = [cells for cells in rows if cells[1:2] == [name]]
    return row


def words(result: Result) -> str:
    """Return the output with single blanks, wherever its lines were broken."""
    return " ".join(result.stdout.split())


def test_list_tells_hook_name_distribution_and_version_without_an_import(
    install: Install, run_cli: Run
) -> None:
    install("other-tools", {"log": ("other",)}, EXPLODES)
    result = run_cli("plugins")
    assert result.exit_code == 0
    assert result.stdout.split()[:5] == ["HOOK", "NAME", "DISTRIBUTION", "VERSION", "STATE"]
    assert row_of(result, "other") == ["log", "other", "other-tools", "1.2", "ready"]


def test_list_is_ordered_by_hook_and_name_whatever_was_installed_first(
    install: Install, run_cli: Run
) -> None:
    install("zzz", {"export": ("aa",), "log": ("zz", "aa")})
    names = [line.split()[:2] for line in run_cli("plugins").stdout.splitlines()]
    ours = [cells for cells in names if cells[1:] in (["aa"], ["zz"])]
    assert ours == [["log", "aa"], ["log", "zz"], ["export", "aa"]]


@pytest.mark.parametrize("arguments", [("collate",), ("--json", "collate"), ("collate", "--json")])
def test_list_is_narrowed_to_a_hook(
    install: Install, run_cli: Run, arguments: tuple[str, ...]
) -> None:
    install("other-tools", {"log": ("other",), "collate": ("mine",)})
    output = run_cli("plugins", *arguments).stdout
    assert "mine" in output
    assert "other " not in output
    assert ("--json" in arguments) == output.startswith("[")


def test_list_says_so_when_a_hook_has_no_plugin(run_cli: Run) -> None:
    result = run_cli("plugins", "wrap")
    assert (result.exit_code, result.stdout) == (0, "No plugin of wrap is installed.\n")


def test_list_refuses_an_unknown_hook_and_names_the_nearest(run_cli: Run) -> None:
    result = run_cli("plugins", "colate")
    assert result.exit_code == 2
    assert "'colate' is no hook; the hooks are compile, collate," in result.stderr
    assert "Did you mean 'collate'?" in result.stderr


def test_json_has_every_fact_of_the_list(install: Install, run_cli: Run) -> None:
    install("fact-tools", {"log": ("other",)}, requires=("surely-absent>=2; extra == 'other'",))
    rows = json.loads(run_cli("plugins", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == "other"]
    assert row.pop("object").endswith("_plugin_0")
    assert row == {
        "hook": "log",
        "name": "other",
        "distribution": "fact-tools",
        "version": "1.2",
        "state": "may need surely-absent",
        "reason": None,
        "install": 'pip install "fact-tools[other]"',
    }


@pytest.mark.parametrize(
    ("requires", "state", "install_line"),
    [
        ((), "ready", None),
        (("torch>=2", "click"), "ready", None),
        (("surely-absent[x]>=2",), "needs surely-absent", "pip install {name}"),
        (("surely-absent; extra == 'two'",), "ready", None),
        (
            ("click; extra == 'one'", "surely-absent (>1); extra == 'one'"),
            "may need surely-absent",
            'pip install "{name}[one]"',
        ),
        (("surely-absent; sys_platform == 'plan9'",), "ready", None),
    ],
)
def test_state_is_read_from_the_metadata(
    install: Install,
    run_cli: Run,
    requires: tuple[str, ...],
    state: str,
    install_line: str | None,
) -> None:
    name = f"tools-{next(NUMBERS)}"
    install(name, {"wrap": ("one",)}, EXPLODES, requires)
    result = run_cli("plugins", "wrap")
    assert row_of(result, "one")[4] == state
    assert ("To install what is missing:" in result.stdout) == (install_line is not None)
    assert (install_line or "").format(name=name) in result.stdout


def test_state_overlooks_an_extra_that_is_made_of_others(install: Install, run_cli: Run) -> None:
    install("self-tools", {"log": ("all",)}, EXPLODES, ("self_tools[one]; extra == 'all'",))
    assert row_of(run_cli("plugins"), "all")[4] == "ready"


def test_state_tells_how_to_choose_a_name_that_two_offer(install: Install, run_cli: Run) -> None:
    install("first-tools", {"log": ("twice",)})
    install("second-tools", {"log": ("twice",)})
    output = run_cli("plugins").stdout
    assert "ready as first-tools:twice" in output
    assert "ready as second-tools:twice" in output


def test_state_of_a_reserved_name_says_that_nobody_can_choose_it(
    install: Install, run_cli: Run
) -> None:
    install("bold-tools", {"compile": ("off",)})
    result = run_cli("plugins", "compile")
    assert row_of(result, "off")[4] == "cannot be chosen"
    told = "- plugin 'off' (bold-tools 1.2): its name has a meaning of its own in the config"
    assert told in words(result)


def test_check_imports_every_plugin_and_fails_when_one_is_broken(
    install: Install, run_cli: Run
) -> None:
    install("good-tools", {"log": ("good",)}, TRACKER)
    install("bad-tools", {"log": ("bad",)}, EXPLODES)
    install("lone-tools", {"log": ("lone",)}, "import surely_absent")
    install("odd-tools", {"log": ("odd",)}, "def __dir__():\n    raise OSError(3)")
    result = run_cli("plugins", "log", "--check")
    assert result.exit_code == 1
    assert row_of(result, "good")[4] == "loads"
    assert row_of(result, "bad")[4] == "broken"
    assert row_of(result, "odd")[4] == "broken"
    assert row_of(result, "lone")[4] == "needs surely_absent"
    assert "imported, though nobody asked for it" in words(result)
    assert "pip install surely_absent" in result.stdout


def test_check_survives_a_plugin_that_ends_its_process(install: Install, run_cli: Run) -> None:
    install("exit-tools", {"log": ("gone",)}, "import os\nos._exit(0)")
    install("good-tools", {"log": ("good",)}, TRACKER)
    result = run_cli("plugins", "log", "--check")
    assert result.exit_code == 1
    assert row_of(result, "gone")[4] == "ends the process"
    assert row_of(result, "good")[4] == "loads"


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_list_shows_who_is_kept_out_and_by_what(
    install: Install, run_cli: Run, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    install("good-tools", {"log": ("good",)}, EXPLODES)
    install("other-tools", {"log": ("other",)}, EXPLODES)
    flags = ("--allow", "Good_Tools")
    arguments = {"before": (*flags, "log"), "after": ("log", *flags), "environment": ("log",)}
    if where == "environment":
        monkeypatch.setenv("DOVETAIL_PLUGIN_ALLOW", "good-tools")
    result = run_cli("plugins", *arguments[where])
    assert result.exit_code == 0, result.stderr
    assert row_of(result, "good")[4] == "ready"
    assert row_of(result, "other")[4] == "kept out"
    assert row_of(result, "tensorboard")[4] != "kept out"
    by = "environment variable DOVETAIL_PLUGIN_ALLOW"
    by = by if where == "environment" else "option --allow"
    assert result.stdout.count(f"- kept out by the {by}") == 1


def test_check_imports_nobody_who_is_kept_out(install: Install, run_cli: Run) -> None:
    install("bad-tools", {"log": ("bad",)}, EXPLODES)
    result = run_cli("plugins", "--no-autoload", "--check", "log")
    assert result.exit_code == 0
    assert row_of(result, "bad")[4] == "kept out"


@pytest.mark.parametrize("command", [(), ("show", "exact"), ("doctor",), ("order", "log")])
def test_allowing_what_does_not_exist_is_an_error(run_cli: Run, command: tuple[str, ...]) -> None:
    result = run_cli("plugins", *command, "--allow", "surely-absent")
    assert result.exit_code == 2
    assert "option --allow: no installed distribution offers 'surely-absent'" in result.stderr


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_line_is_what_the_command_says_of_itself(name: str) -> None:
    with click.Context(plugins) as context:
        command = plugins.get_command(context, name)
    assert command is not None
    assert command.get_short_help_str(100).startswith(SUBCOMMANDS[name][1].removesuffix("."))


def test_help_lists_every_command(run_cli: Run) -> None:
    output = run_cli("plugins", "--help").output
    for name, (_, line) in SUBCOMMANDS.items():
        assert f"  {name.ljust(6)}  {line}" in output


def test_check_succeeds_when_a_package_is_all_that_is_missing(
    install: Install, run_cli: Run
) -> None:
    install("lone-tools", {"wrap": ("lone",)}, "import surely_absent")
    assert run_cli("plugins", "wrap", "--check").exit_code == 0


def test_show_tells_origin_use_and_options(install: Install, run_cli: Run) -> None:
    install("slow-tools", {"collate": ("slow",)}, COLLATOR, ("click; extra == 'slow'", "torch"))
    result = run_cli("plugins", "show", "slow")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == ["slow: plugin of the collate hook", "  Collates nothing, slowly."]
    assert lines[2].startswith("  from       slow-tools 1.2 (")
    assert lines[3].startswith("  file       ")
    assert Path(lines[3].split()[1]).read_text() == COLLATOR
    assert lines[4:] == [
        "  needs      torch",
        "  extra      slow-tools[slow]: click",
        "  API        1, as it states none",
        '  to use it  [collate] use = "slow"',
        "",
        "Options, in [collate.slow]:",
        "  size: integer >= 1, <= 64 = 8",
        "      Items of a window.",
        '  mode: "fast" | "slow" | none = none',
        "      How it goes about it.",
        "  weights: list of number, required",
        "      One per class.",
    ]


def test_show_tells_which_hooks_a_wrapper_is_around(install: Install, run_cli: Run) -> None:
    order = 'dovetail_api = 1\ndovetail_before = ("upload", "notify")\n'
    install("time-tools", {"wrap": ("timer",)}, WRAPPER + order)
    lines = run_cli("plugins", "show", "timer").stdout.splitlines()
    assert '  to use it  [run] plugins = ["timer"]' in lines
    assert "  around     export" in lines
    assert "  before     upload, notify" in lines
    assert "  API        1" in lines
    assert not any(line.startswith("  after") for line in lines)


def test_show_tells_what_is_missing_and_where_an_editable_plugin_lies(
    install: Install, run_cli: Run
) -> None:
    requires = ("click", "surely-absent>=2", "dovetail")
    site = install("edit-tools", {"log": ("edit",)}, TRACKER, requires)
    content = {"url": site.as_uri(), "dir_info": {"editable": True}}
    (site / "edit_tools-1.2.dist-info" / "direct_url.json").write_text(json.dumps(content))
    lines = run_cli("plugins", "show", "edit").stdout.splitlines()
    assert f"  editable   from {site}" in lines
    assert "  needs      click, surely-absent (missing)" in lines
    assert "  install    pip install edit-tools" in lines


def test_show_refuses_a_plugin_that_is_kept_out(install: Install, run_cli: Run) -> None:
    install("bad-tools", {"log": ("bad",)}, EXPLODES)
    result = run_cli("plugins", "show", "bad", "--no-autoload")
    assert result.exit_code == 2
    assert "plugin 'bad': is kept out by option --no-autoload;" in result.stderr
    assert "bad-tools offers it: allow it there." in result.stderr
    assert run_cli("plugins", "show", "tabular", "--no-autoload").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "hooks"),
    [
        (("both",), ["collate", "log"]),
        (("log.both",), ["log"]),
        (("both", "--hook", "collate"), ["collate"]),
        (("both-tools:both",), ["collate", "log"]),
        (("log.both-tools:both",), ["log"]),
    ],
)
def test_show_takes_a_name_of_several_hooks(
    install: Install, run_cli: Run, arguments: tuple[str, ...], hooks: list[str]
) -> None:
    install("both-tools", {"collate": ("both",), "log": ("both",)}, COLLATOR + TRACKER)
    output = run_cli("plugins", "show", *arguments).stdout
    shown = [line.split()[-2] for line in output.splitlines() if line.startswith("both: plugin")]
    assert shown == hooks


def test_show_fails_with_the_reason_when_the_plugin_is_broken(
    install: Install, run_cli: Run
) -> None:
    install("bad-tools", {"log": ("bad",)}, EXPLODES)
    result = run_cli("plugins", "show", "bad")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: plugin 'bad' (bad-tools 1.2): ")
    assert "imported, though nobody asked for it" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("exat",), "Did you mean 'exact'?"),
        (("exact", "--hook", "log"), "It is a plugin of the accumulate hook."),
        (("log.exact",), "is not installed"),
        (("absent-backend",), "Install it: pip install dovetail-absent"),
        (("log.absent-backend",), "Install it: pip install dovetail-absent"),
    ],
)
def test_show_refuses_an_unknown_name(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], hint: str
) -> None:
    # The known ones may be installed here.
    known = {("log", "absent-backend"): "dovetail-absent"}
    monkeypatch.setattr("dovetail.cli._details.KNOWN_CONTRIB", known)
    result = run_cli("plugins", "show", *arguments)
    assert result.exit_code == 2
    assert hint in result.stderr


def test_show_describes_every_installed_plugin(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once for all of them, not once for each.
    monkeypatch.setattr("dovetail.registry.probe.PRELOADED", ("torch",))
    rows = json.loads(run_cli("plugins", "--json", "--check").stdout)
    loadable = [row for row in rows if row["state"] == "loads"]
    assert {row["hook"] for row in loadable} >= {"collate", "accumulate"}
    for row in loadable:
        output = run_cli("plugins", "show", f"{row['hook']}.{row['name']}").stdout
        assert output.startswith(f"{row['name']}: ")
        # Where the file lies is as long as the reader's own folders make it.
        told = [line for line in output.splitlines() if ".py" not in line]
        assert max(map(len, told)) <= 100
