"""`dovetail plugins doctor`: faults that were planted are found, each with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dovetail.cli import _doctor

pytestmark = pytest.mark.usefixtures("light_probe", "strangers_only")

Install = Callable[..., Path]
Run = Callable[..., Result]

GOOD = """
from dovetail import hookimpl

@hookimpl
def dovetail_log(run):
    return None
"""


@pytest.fixture
def strangers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is there already: dovetail's own plugins, and those of other tests."""
    every = _doctor.list_entry_points
    known = every()
    monkeypatch.setattr(
        _doctor, "list_entry_points", lambda: [p for p in every() if p not in known]
    )


def blocks_of(result: Result) -> list[str]:
    """Return the findings and the last line, each as one line."""
    return [" ".join(block.split()) for block in result.stdout.split("\n\n")]


def test_doctor_finds_nothing_where_all_is_well(install: Install, run_cli: Run) -> None:
    install("good-tools", {"log": ("good", "better")}, GOOD)
    result = run_cli("plugins", "doctor")
    assert result.exit_code == 0
    assert result.stdout == "2 plugins of 1 distribution: all is well\n"


@pytest.mark.parametrize(
    ("plugins", "source", "requires", "texts"),
    [
        ({"log": ("x",)}, "raise KeyError('boom')", (), ("KeyError: 'boom'", "pip uninstall")),
        ({"log": ("x",)}, "import os\nos._exit(3)", (), ("(exit status 3)", "pip uninstall")),
        ({"log": ("x",)}, f"dovetail_api = 9\n{GOOD}", (), ("was written for API 9",)),
        ({"log": ("x",)}, GOOD.replace("_log", "_lgo"), (), ("Did you mean 'dovetail_log'?",)),
        ({"log": ("x",)}, "import surely_absent", (), ("pip install surely_absent",)),
        (
            {"log": ("x", "y")},
            "import surely_absent",
            ("surely-absent>=2",),
            ("'planted-tools': needs surely-absent, which is", "-> pip install planted-tools"),
        ),
        ({"log": ("auto",)}, GOOD, (), ("its name has a meaning of its own", "-> Its author")),
    ],
)
def test_doctor_fails_with_the_remedy_when_a_plugin_is_broken(
    install: Install,
    run_cli: Run,
    plugins: dict[str, tuple[str, ...]],
    source: str,
    requires: tuple[str, ...],
    texts: tuple[str, ...],
) -> None:
    install("planted-tools", plugins, source, requires)
    result = run_cli("plugins", "doctor")
    assert result.exit_code == 1
    finding, last = blocks_of(result)
    assert finding.startswith("broken: ")
    assert all(text in finding for text in texts)
    assert last.endswith(" of 1 distribution: 1 broken")
    assert max(map(len, result.stdout.splitlines())) <= 80 or "/" in finding


def test_doctor_tells_a_missing_module_once(install: Install, run_cli: Run) -> None:
    site = install("gone-tools", {"log": ("gone",)}, GOOD)
    next(site.glob("*.py")).unlink()
    finding, _ = blocks_of(run_cli("plugins", "doctor"))
    assert finding.endswith("which is not there. -> pip install --force-reinstall gone-tools")


def test_doctor_notes_an_extra_that_is_not_installed(install: Install, run_cli: Run) -> None:
    requires = ("surely-absent; extra == 'x'",)
    install("extra-tools", {"log": ("x",)}, "import surely_absent", requires)
    result = run_cli("plugins", "doctor")
    assert result.exit_code == 0
    finding, last = blocks_of(result)
    assert "its extra names surely-absent, which is not installed." in finding
    assert finding.endswith('-> pip install "extra-tools[x]"')
    assert last.endswith(": 1 to note")


def test_doctor_tells_a_slow_import_with_its_time(
    install: Install, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor, "SLOW_MS", 0.0)
    install("slow-tools", {"log": ("slow",)}, f"import time\ntime.sleep(0.05)\n{GOOD}")
    result = run_cli("plugins", "doctor", "--verbose")
    assert result.exit_code == 0
    _, row = (line.split() for line in blocks_of(result)[0].split(" STATE "))
    assert row[:4] == ["log", "slow", "slow-tools", "1.2"]
    assert int(row[4]) >= 50
    assert row[5] == "loads"
    assert f"slow: plugin 'slow' (slow-tools 1.2): takes {row[4]} ms" in blocks_of(result)[1]


def test_doctor_does_not_wait_for_a_plugin_that_never_ends(install: Install, run_cli: Run) -> None:
    install("hang-tools", {"log": ("hang",)}, "import time\ntime.sleep(1000)")
    result = run_cli("plugins", "doctor", "--timeout", "0.5")
    assert result.exit_code == 1
    assert "is not imported after 0.5 s" in blocks_of(result)[0]


def test_doctor_notes_what_is_deprecated(install: Install, run_cli: Run) -> None:
    warn = "import warnings\nfrom dovetail.errors import DovetailDeprecationWarning as W\n"
    warn += "warnings.warn(W('the hook x goes.'))"
    install("old-tools", {"log": ("old",)}, f"{warn}\n{GOOD}")
    result = run_cli("plugins", "doctor")
    assert result.exit_code == 0
    finding = blocks_of(result)[0]
    assert finding.startswith("note: plugin 'old' (old-tools 1.2): the hook x goes. (")
    assert finding.endswith("-> pip install --upgrade old-tools, or tell its author.")


def test_doctor_notes_names_that_two_offer_and_who_is_kept_out(
    install: Install, run_cli: Run
) -> None:
    for name in ("first-tools", "second-tools"):
        install(name, {"log": ("twice",)}, GOOD)
    install("bad-tools", {"log": ("bad",)}, "raise RuntimeError('imported')")
    allow = ("--allow", "first-tools", "--allow", "second-tools")
    result = run_cli("plugins", "doctor", *allow)
    assert result.exit_code == 0
    shared, kept_out, last = blocks_of(result)
    assert "the name is offered by first-tools 1.2 and by second-tools 1.2." in shared
    assert shared.endswith('-> Write "first-tools:twice" or "second-tools:twice" in a config.')
    assert kept_out.startswith("note: distribution 'bad-tools': is kept out (log bad).")
    assert kept_out.endswith("-> To let it in, change the option --allow.")
    assert last == "2 plugins of 2 distributions: 2 to note"


def test_doctor_tells_the_gravest_first_and_counts(install: Install, run_cli: Run) -> None:
    for name in ("first-tools", "second-tools"):
        install(name, {"log": ("twice",)}, GOOD)
    install("bad-tools", {"log": ("zzz",)}, "raise RuntimeError('boom')")
    result = run_cli("plugins", "doctor")
    assert [b.partition(":")[0] for b in blocks_of(result)[:-1]] == ["broken", "note"]
    assert blocks_of(result)[-1] == "3 plugins of 3 distributions: 1 broken, 1 to note"


def test_doctor_is_printed_as_json(install: Install, run_cli: Run) -> None:
    install("bad-tools", {"log": ("bad",)}, "raise RuntimeError('boom')")
    result = run_cli("plugins", "doctor", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert [(p["name"], p["outcome"]) for p in told["plugins"]] == [("bad", "broken")]
    assert [(f["kind"], f["remedy"]) for f in told["findings"]] == [("broken", None)]
