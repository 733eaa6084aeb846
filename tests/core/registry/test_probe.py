"""Plugins that end, stop, spoil or flood the process that imports them, and those that do not."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.registry import probe
from dovetail.registry.listing import PluginInfo
from dovetail.registry.probe import Probed, probe_plugins

GOOD = """
from dovetail import hookimpl

@hookimpl
def dovetail_log(run):
    return None
"""

Import = Callable[..., dict[str, Probed]]

REAL_PRELOADED = probe.PRELOADED

needs_fork = pytest.mark.skipif(not probe.CAN_FORK, reason="a process cannot fork here")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each test the import of torch."""
    monkeypatch.setattr(probe, "PRELOADED", ())


@pytest.fixture
def probe_sources(site: Any) -> Import:
    """Import modules of the given sources as plugins of the log hook, none of them here."""

    def run(timeout_s: float = 60.0, **sources: str) -> dict[str, Probed]:
        for name, source in sources.items():
            site.add_module(f"probed_{name}", source)
        plugins = [PluginInfo("log", n, "some-tools", "1.2", f"probed_{n}") for n in sources]
        before = set(sys.modules)
        answers = dict(zip(sources, probe_plugins(plugins, timeout_s), strict=True))
        assert not any(name.startswith("probed_") for name in set(sys.modules) - before)
        return answers

    return run


def test_probe_tells_each_plugin_whatever_the_others_do(
    probe_sources: Import, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = probe_sources(
        first=GOOD,
        exits="import sys; sys.exit(4)",
        ends="import os; os._exit(3)",
        raises="raise RuntimeError('x' * 10**7)",
        interrupts="raise KeyboardInterrupt",
        lacks="import surely_absent",
        floods=f"import os\nos.write(1, b'{{}}\\n' * 10**6)\nprint('y' * 10**6)\n{GOOD}",
        patches=f"import builtins, sys, os\nsys.path.clear()\nbuiltins.open = None\n{GOOD}",
        strange="def __dir__():\n    raise OSError(3)",
        last=GOOD,
    )
    outcomes = {name: probed.outcome for name, probed in answers.items()}
    assert outcomes == {
        "first": "loads",
        "exits": "broken",
        "ends": "ended",
        "raises": "broken",
        "interrupts": "broken",
        "lacks": "needs",
        "floods": "loads",
        "patches": "loads",
        "strange": "broken",
        "last": "loads",
    }
    for name, probed in answers.items():
        assert (probed.reason is None) == (probed.outcome == "loads")
        assert (probed.reason or f"plugin {name!r}").startswith(f"plugin {name!r}")
    assert "(exit status 3)" in str(answers["ends"].reason)
    assert len(str(answers["raises"].reason)) < 5000
    assert answers["lacks"].package == "surely_absent"
    assert capfd.readouterr() == ("", "")


@needs_fork
def test_probe_names_the_signal_that_ended_a_plugin(probe_sources: Import) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    assert "(SIGSEGV)" in str(probe_sources(crashes=source)["crashes"].reason)


@needs_fork
def test_probe_gives_up_on_a_plugin_that_never_ends_and_goes_on(
    probe_sources: Import, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    hangs = f"""
    import os, pathlib, time
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    pathlib.Path({str(note)!r}).write_text(str(child))
    time.sleep(1000)
    """
    mute = "import os, time\nos.closerange(3, 200)\ntime.sleep(1000)"
    answers = probe_sources(timeout_s=1.0, hangs=hangs, mute=mute, good=GOOD)
    assert [probed.outcome for probed in answers.values()] == ["timed out", "timed out", "loads"]
    assert "is not imported after 1 s" in str(answers["hangs"].reason)
    # What it started has ended with it; a container may keep it as a zombie that nobody reaps.
    assert is_gone(int(note.read_text()))


def is_gone(pid: int) -> bool:
    """Wait for a process that was killed to end."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


@needs_fork
def test_probe_goes_on_when_a_plugin_ends_the_process_that_forks(probe_sources: Import) -> None:
    kills = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(0.1)"
    answers = probe_sources(first=GOOD, kills=kills, last=GOOD)
    assert [probed.outcome for probed in answers.values()] == ["loads", "ended", "loads"]
    assert "(SIGKILL)" in str(answers["kills"].reason)


@needs_fork
def test_probe_does_not_take_junk_for_an_answer(probe_sources: Import) -> None:
    junk = """
    import os
    for descriptor in range(3, 50):
        try:
            os.write(descriptor, b"junk\\n")
        except OSError:
            pass
    """
    answers = probe_sources(junk=junk, good=GOOD)
    assert answers["junk"].outcome == "ended"
    assert "no answer came" in str(answers["junk"].reason)
    assert answers["good"].outcome == "loads"


def test_probe_counts_the_import_of_the_plugin_alone(
    probe_sources: Import, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add_module("probed_common", "")
    monkeypatch.setattr(probe, "PRELOADED", ("probed_common", "surely_absent"))
    lean = f"import sys\nassert 'probed_common' in sys.modules\n{GOOD}"
    answers = probe_sources(slow=f"import time\ntime.sleep(0.4)\n{GOOD}", lean=lean)
    assert answers["slow"].duration_ms >= 400
    assert answers["lean"].outcome == "loads"


def test_probe_knows_what_a_run_imports_anyway() -> None:
    assert all(importlib.util.find_spec(name) for name in REAL_PRELOADED)
    assert "dovetail.pipeline" in REAL_PRELOADED


def test_probe_tells_what_is_deprecated(probe_sources: Import) -> None:
    source = f"""
import warnings
from dovetail.errors import DovetailDeprecationWarning

warnings.warn("another library's own", DeprecationWarning)
warnings.warn(DovetailDeprecationWarning("the hook goes. Use another."))
{GOOD}
"""
    (told,) = probe_sources(old=source)["old"].deprecations
    assert told.startswith("the hook goes. Use another. (")
    assert told.endswith("probed_old.py:6)")


def test_probe_starts_a_process_for_each_where_it_cannot_fork(
    probe_sources: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CAN_FORK", False)
    hangs = "import time\ntime.sleep(1000)"
    answers = probe_sources(timeout_s=1.0, ends="import os; os._exit(3)", hangs=hangs, good=GOOD)
    assert [probed.outcome for probed in answers.values()] == ["ended", "timed out", "loads"]


def test_probe_of_nothing_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert list(probe_plugins([])) == []


def test_probe_leaves_no_process_behind_when_it_is_given_up(site: Any, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    site.add_module("probed_good", GOOD)
    lines = "import os, pathlib, time"
    text = f"{lines}\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(1000)"
    site.add_module("probed_long", text)
    plugins = [PluginInfo("log", n, "tools", "1", f"probed_{n}") for n in ("good", "long")]
    answers = probe_plugins(plugins)
    next(answers)
    while not note.exists() or not note.read_text():
        time.sleep(0.01)
    answers.close()  # type: ignore[attr-defined]
    assert is_gone(int(note.read_text()))
