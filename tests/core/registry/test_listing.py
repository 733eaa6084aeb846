from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dovetail.registry.listing import (
    PluginInfo,
    distribution_of,
    extra_for,
    list_entry_points,
    normalize,
)


def planted(*distributions: str) -> list[PluginInfo]:
    return [info for info in list_entry_points() if info.distribution in distributions]


def test_listing_tells_name_hook_distribution_and_version_and_imports_nothing(site: Any) -> None:
    groups = {
        "dovetail.export": {"zip": "planted_zip"},
        "dovetail.collate": {"radar": "planted_radar:plugin"},
        "dovetail.plugins": {"timer": "planted_timer"},
    }
    broken = "raise RuntimeError('imported')"
    site.add("acme-things", groups, planted_zip=broken, planted_radar=broken, planted_timer=broken)
    assert planted("acme-things") == [
        PluginInfo("collate", "radar", "acme-things", "1.2", "planted_radar:plugin"),
        PluginInfo("export", "zip", "acme-things", "1.2", "planted_zip"),
        PluginInfo("wrap", "timer", "acme-things", "1.2", "planted_timer"),
    ]
    assert not {"planted_zip", "planted_radar", "planted_timer"} & set(sys.modules)


def test_listing_needs_neither_pydantic_nor_torch() -> None:
    code = (
        "import sys; from dovetail.registry import list_entry_points; list_entry_points();"
        "heavy = {'torch', 'pydantic', 'numpy', 'dovetail_plugins'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_listing_sorts_by_hook_name_and_distribution(site: Any) -> None:
    site.add("b-dist", {"dovetail.export": {"same": "x", "a": "x"}, "dovetail.compile": {"z": "x"}})
    site.add("a-dist", {"dovetail.export": {"same": "x"}})
    found = [(p.role, p.name, p.distribution) for p in planted("a-dist", "b-dist")]
    assert found == [
        ("compile", "z", "b-dist"),
        ("export", "a", "b-dist"),
        ("export", "same", "a-dist"),
        ("export", "same", "b-dist"),
    ]


@pytest.mark.parametrize("name", ["off", "auto"])
def test_listing_marks_names_that_nobody_could_choose(site: Any, name: str) -> None:
    site.add("acme", {"dovetail.collate": {name: "x"}})
    (info,) = planted("acme")
    assert info.is_reserved


def test_listing_survives_what_an_interrupted_installation_left_behind(site: Any) -> None:
    info = site.path / "half_gone-3.0.dist-info"
    info.mkdir()
    site.add_entry_points(info, {"dovetail.export": {"half": "half_gone"}})
    site.add("acme", {"dovetail.export": {"half": "x"}})
    names = {p.distribution for p in list_entry_points() if p.name == "half"}
    assert "acme" in names
    assert len(names) == 2
    assert all(names)


def test_where_names_plugin_distribution_and_version() -> None:
    assert PluginInfo("log", "a", "acme", "1.2", "x").where == "plugin 'a' (acme 1.2)"
    assert PluginInfo("log", "a", "this session", "", "x").where == "plugin 'a' (this session)"


@pytest.mark.parametrize("name", ["zip", "Acme_Things:zip", "acme-things:zip", "acme.things:zip"])
def test_is_named_takes_the_name_and_any_spelling_of_the_distribution(name: str) -> None:
    assert PluginInfo("export", "zip", "acme-things", "1", "x").is_named(name)


@pytest.mark.parametrize("name", ["Zip", "acme:zip", "acme-things:zap", ":zip", "acme-things:"])
def test_is_named_refuses_anything_else(name: str) -> None:
    assert not PluginInfo("export", "zip", "acme-things", "1", "x").is_named(name)


def test_normalize_follows_the_packaging_specification() -> None:
    assert {normalize(n) for n in ("A.b_c", "a-b-c", "A--b__c", "a._-b.c")} == {"a-b-c"}


@pytest.mark.parametrize(
    ("package", "extra"),
    [("torchvision", "vision"), ("PIL", "vision"), ("sea_lion", "sea"), ("absent", None)],
)
def test_extra_for_finds_the_extra_that_brings_a_module(
    site: Any, package: str, extra: str | None
) -> None:
    requires = [
        "numpy>=1",
        "torchvision>=0.21 ; extra == 'all'",
        "torchvision>=0.21 ; extra == 'vision'",
        'Pillow[jpeg] >=10 ; extra == "vision"',
        "sea.lion ; python_version > '3' and extra == 'sea'",
    ]
    site.add("acme-extras", {}, requires=requires)
    assert extra_for("acme-extras", package) == extra


def test_extra_for_knows_no_extra_of_a_distribution_that_is_not_there() -> None:
    assert extra_for("nosuch-distribution", "torch") is None


def test_distribution_of_knows_modules_that_are_called_otherwise() -> None:
    assert distribution_of("PIL") == "pillow"
    assert distribution_of("torch") == "torch"
