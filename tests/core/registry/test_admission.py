from __future__ import annotations

from typing import Any

import pytest

from dovetail import PluginOptions
from dovetail.errors import ConfigError, UnknownPluginError
from dovetail.preflight import check_config
from dovetail.registry import Registry
from dovetail.registry.admission import Admission, option_sources, read_environment

COLLATE = (
    "from dovetail import hookimpl\n"
    "@hookimpl\ndef dovetail_collate(task): return lambda samples: {}\n"
)


@pytest.fixture
def strangers(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions with a collator each; no variable is set."""
    for variable in ("DOVETAIL_PLUGIN_AUTOLOAD", "DOVETAIL_PLUGIN_ALLOW"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("radar", "sonar"):
        module = f"planted_{name}"
        site.add(f"Acme_{name}", {"dovetail.collate": {name: module}}, **{module: COLLATE})


def seen(admission: Admission | None = None) -> set[str]:
    plugins = Registry(admission=admission).list_plugins("collate")
    return {p.name for p in plugins if p.name in ("radar", "sonar", "vision")}


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("admission", "names"),
    [
        (Admission(), {"radar", "sonar", "vision"}),
        (Admission(autoload=True), {"radar", "sonar", "vision"}),
        (Admission(autoload=False), {"vision"}),
        (Admission(allow=()), {"vision"}),
        (Admission(allow=("acme-radar",)), {"radar", "vision"}),
        (Admission(autoload=False, allow=("ACME.sonar",)), {"sonar", "vision"}),
        (Admission(autoload=True, allow=("acme-radar:radar",)), {"radar", "vision"}),
    ],
)
def test_admission_lets_in_what_is_allowed_and_always_our_own(
    admission: Admission, names: set[str]
) -> None:
    assert seen(admission) == names


@pytest.mark.usefixtures("strangers")
def test_environment_decides_and_an_option_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_PLUGIN_AUTOLOAD", "off")
    assert seen() == {"vision"}
    assert seen(Admission(autoload=True)) == {"radar", "sonar", "vision"}
    monkeypatch.setenv("DOVETAIL_PLUGIN_ALLOW", "acme-radar, acme-sonar")
    assert seen() == {"radar", "sonar", "vision"}
    assert seen(option_sources({"autoload": None, "allow": ("acme-sonar",)})) == {"sonar", "vision"}
    monkeypatch.setenv("DOVETAIL_PLUGIN_ALLOW", "")
    assert seen() == {"vision"}


@pytest.mark.usefixtures("strangers")
def test_config_decides_and_the_environment_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"run": {"plugin_allow": ["acme-radar"]}, "collate": {"use": "radar"}}
    assert "radar" in check_config(tables, registry=Registry()).options("collate")
    off = {"run": {"plugin_autoload": False}, "collate": {"use": "radar"}}
    with pytest.raises(UnknownPluginError) as caught:
        check_config(off, registry=Registry())
    assert str(caught.value).endswith(
        "Acme_radar offers it; config run.plugin_autoload keeps it out. Allow it there."
    )
    monkeypatch.setenv("DOVETAIL_PLUGIN_ALLOW", "acme-sonar")
    with pytest.raises(UnknownPluginError, match="variable DOVETAIL_PLUGIN_ALLOW keeps it out"):
        check_config(tables, registry=Registry())


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("acme-radra", "Did you mean 'Acme_radar'?"),
        ("radar", "'radar' is a plugin of Acme_radar; write 'Acme_radar'."),
        ("acme-radar:sonar", "offers 'acme-radar:sonar'"),
        ("zzz", "(Acme_radar, Acme_sonar"),
    ],
)
def test_a_name_that_does_not_exist_is_an_error_wherever_it_stands(
    entry: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({"run": {"plugin_allow": [entry]}}, registry=Registry())
    assert str(caught.value).startswith("config run.plugin_allow: no installed distribution offers")
    assert hint in str(caught.value)
    monkeypatch.setenv("DOVETAIL_PLUGIN_ALLOW", entry)
    with pytest.raises(ConfigError, match=r"^environment variable DOVETAIL_PLUGIN_ALLOW: no inst"):
        Registry().list_plugins()
    with pytest.raises(ConfigError, match=r"^option --allow: no installed"):
        Registry(admission=option_sources({"allow": (entry,)})).list_plugins()


def test_environment_refuses_what_is_neither_on_nor_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_PLUGIN_AUTOLOAD", "perhaps")
    with pytest.raises(ConfigError, match="DOVETAIL_PLUGIN_AUTOLOAD: got 'perhaps'; expected one"):
        read_environment()


@pytest.mark.usefixtures("strangers")
def test_what_this_session_registers_is_always_in() -> None:
    class Plugin:
        """Collates."""

    registry = Registry(admission=Admission(autoload=False))
    from dovetail import hookimpl

    Plugin.dovetail_collate = hookimpl(lambda self: None)  # type: ignore[attr-defined]
    registry.register(Plugin(), hook="collate", name="mine")
    assert registry.find("collate", "mine").distribution == "this session"
    assert registry.build_options("collate", "mine", {}) == PluginOptions()
