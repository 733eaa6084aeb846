from __future__ import annotations

import ast
import subprocess
import sys
import types
from typing import Any

import pytest

from dovetail import API_VERSION, PluginOptions, hookimpl
from dovetail.errors import BrokenPluginError, MissingDependencyError, PluginError
from dovetail.registry import Registry

HEAD = "from dovetail import PluginOptions, hookimpl\n"
GOOD = HEAD + "@hookimpl\ndef dovetail_export(task, options): return None\n"


def refusal(site: Any, source: str, kind: type[PluginError] = BrokenPluginError) -> str:
    """Install a plugin of the export hook from its source; return how it is refused."""
    value = "planted_broken"
    site.add("acme", {"dovetail.export": {"zip": value}}, planted_broken=source)
    registry = Registry()
    assert [p.name for p in registry.list_plugins("export") if p.distribution == "acme"] == ["zip"]
    with pytest.raises(kind) as caught:
        registry.load("export", "zip")
    message = str(caught.value)
    assert message.startswith("plugin 'zip' (acme 1.2)")
    return message


def test_load_returns_the_checked_plugin_with_its_summary(site: Any) -> None:
    site.add(
        "acme",
        {"dovetail.export": {"zip": "planted_zip"}},
        planted_zip=f'"""Zips.\n\nMore."""\n{GOOD}',
    )
    backend = Registry().load("export", "zip")
    assert backend.summary == "Zips."
    assert backend.info.distribution == "acme"
    assert backend.options_model("export") is PluginOptions


def test_load_imports_a_plugin_once(site: Any) -> None:
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip=GOOD)
    registry = Registry()
    assert registry.load("export", "zip") is registry.load("export", "acme:zip")


def test_a_broken_plugin_stops_only_who_names_it(site: Any) -> None:
    groups = {"dovetail.export": {"good": "planted_good", "bad": "planted_bad"}}
    site.add("acme", groups, planted_good=GOOD, planted_bad="1 / 0")
    registry = Registry()
    assert registry.load("export", "good").info.name == "good"
    with pytest.raises(BrokenPluginError):
        registry.load("export", "bad")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("from os import nosuch", "ImportError: cannot import name 'nosuch'"),
        ("def (", "SyntaxError"),
    ],
)
def test_load_tells_a_module_that_raises_and_where(site: Any, source: str, shown: str) -> None:
    message = refusal(site, source)
    assert f"planted_broken does not import: {shown}" in message
    assert "planted_broken.py" in message
    assert "loading.py" not in message
    assert message.endswith("Mend or remove it: pip uninstall acme")


def test_load_lets_a_keyboard_interrupt_through(site: Any) -> None:
    source = "raise KeyboardInterrupt"
    site.add("acme", {"dovetail.export": {"zip": "planted_slow"}}, planted_slow=source)
    with pytest.raises(KeyboardInterrupt):
        Registry().load("export", "zip")


@pytest.mark.parametrize("value", ["planted_gone", "planted_gone.part:plugin"])
def test_load_says_that_the_plugins_own_module_is_gone(site: Any, value: str) -> None:
    site.add("acme", {"dovetail.export": {"zip": value}})
    with pytest.raises(BrokenPluginError) as caught:
        Registry().load("export", "zip")
    assert "planted_gone" in str(caught.value)
    assert "pip install --force-reinstall acme" in str(caught.value)


def test_load_names_the_attribute_that_is_missing(site: Any) -> None:
    site.add("acme", {"dovetail.export": {"zip": "planted_zip:plugni"}}, planted_zip=GOOD)
    with pytest.raises(BrokenPluginError, match="planted_zip:plugni does not import: AttributeErr"):
        Registry().load("export", "zip")


def test_load_gives_the_line_that_installs_a_missing_package(site: Any) -> None:
    message = refusal(site, "import nosuch_library.part", MissingDependencyError)
    assert "needs the package 'nosuch_library', which is not installed" in message
    assert message.endswith("Install it: pip install nosuch_library")


def test_load_gives_the_extra_that_brings_a_missing_package(site: Any) -> None:
    groups = {"dovetail.export": {"zip": "planted_zip"}}
    requires = ["nosuch-library>=2 ; extra == 'zip'"]
    site.add("acme", groups, requires=requires, planted_zip="import nosuch_library")
    with pytest.raises(MissingDependencyError, match=r'pip install "acme\[zip\]"$'):
        Registry().load("export", "zip")


def test_load_tells_an_installed_package_that_lacks_a_module(site: Any) -> None:
    message = refusal(site, "import json.nosuch")
    assert "needs 'json.nosuch', which the installed 'json' does not have" in message


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("def dovetail_export(task): ...", "planted_broken.py:2): is not decorated"),
        ("@hookimpl\ndef dovetail_exprot(task): ...", "Did you mean 'dovetail_export'?"),
        ("@hookimpl\ndef dovtail_export(task): ...", "is no hook; expected one of"),
        (
            "@hookimpl\ndef dovetail_export(tsak): ...",
            "has the parameter 'tsak'; expected some of task, options. Did you mean 'task'?",
        ),
        (
            "@hookimpl\ndef dovetail_collate(task): ...",
            "has no dovetail_export, only dovetail_collate",
        ),
        ("", "has no dovetail_export; expected a function dovetail_export marked with @hookimpl"),
        ("@hookimpl\ndef dovetail_export(options=None): ...", "`options=None`, which would never"),
        ("@hookimpl\ndef dovetail_export(*args): ...", "`*args`, which would never get a value"),
        ("@hookimpl\ndef dovetail_export(**kwargs): ...", "`**kwargs`, which would never get a"),
        ("@hookimpl\ndef dovetail_export(*, task): ...", "`task`, which would never get a value"),
        (
            "@hookimpl(wrapper=True)\ndef dovetail_export(task): return (yield)",
            "is a wrapper, which makes no part of its own. Declare it in the group",
        ),
        ("@hookimpl(wrapper=True)\ndef dovetail_export(task): ...", "not a generator function"),
        (
            "@hookimpl\ndef dovetail_export(options: int): ...",
            "options is annotated with <class 'int'>",
        ),
        ("@hookimpl\ndef dovetail_export(options: 'Absent'): ...", "'Absent', cannot be resolved"),
        (
            "@hookimpl\ndef dovetail_export(options: 'PluginOptions | None'): ...",
            "expected a subclass of dovetail.PluginOptions",
        ),
    ],
)
def test_load_refuses_a_plugin_that_breaks_the_contract(site: Any, body: str, shown: str) -> None:
    assert shown in refusal(site, HEAD + body)


def test_load_refuses_options_that_exist_for_type_checkers_only(site: Any) -> None:
    source = (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        f"{HEAD}"
        "if TYPE_CHECKING:\n"
        "    from elsewhere import Options, TaskSpec\n"
        "@hookimpl\n"
        "def dovetail_export(task: TaskSpec, options: Options): ...\n"
    )
    message = refusal(site, source)
    assert "the annotation of options, 'Options', cannot be resolved" in message
    assert message.endswith(
        "Define the options model at the top of the module, outside TYPE_CHECKING."
    )


@pytest.mark.parametrize(
    ("api", "shown"),
    [
        ("99", f"was written for API 99 of dovetail; this dovetail has {API_VERSION}"),
        ("0", f"planted_broken.py); expected an integer <= {API_VERSION}"),
        ("True", "dovetail_api is True"),
        ("'1'", "dovetail_api is '1'"),
        ("None", "dovetail_api is None"),
    ],
)
def test_load_refuses_another_api(site: Any, api: str, shown: str) -> None:
    assert shown in refusal(site, f"{GOOD}dovetail_api = {api}\n")


def test_load_takes_the_api_it_has(site: Any) -> None:
    source = f"{GOOD}dovetail_api = {API_VERSION}\n"
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip=source)
    assert Registry().load("export", "zip").info.name == "zip"


def test_load_refuses_a_plain_function_among_wrappers(site: Any) -> None:
    site.add("acme", {"dovetail.plugins": {"timer": "planted_timer"}}, planted_timer=GOOD)
    with pytest.raises(
        BrokenPluginError, match="dovetail_export wraps no hook; expected functions"
    ):
        Registry().load("wrap", "timer")


def test_load_refuses_a_wrapper_plugin_without_hooks(site: Any) -> None:
    site.add("acme", {"dovetail.plugins": {"timer": "planted_timer"}}, planted_timer="")
    with pytest.raises(BrokenPluginError, match="it wraps no hook"):
        Registry().load("wrap", "timer")


def test_load_refuses_a_class_where_an_instance_is_meant(site: Any) -> None:
    source = f"{HEAD}class Plugin:\n    @hookimpl\n    def dovetail_export(self, task): ...\n"
    site.add("acme", {"dovetail.export": {"zip": "planted_zip:Plugin"}}, planted_zip=source)
    with pytest.raises(
        BrokenPluginError,
        match=r"planted_zip:Plugin is a class \(.*planted_zip.py:2\); expected a module",
    ):
        Registry().load("export", "zip")


INSTANCE = """
from dovetail import PluginOptions, hookimpl

class Options(PluginOptions):
    level: int = 3

class Plugin:
    '''Zips with a level.'''

    @hookimpl
    def dovetail_export(self, options: Options): ...

plugin = Plugin()
holder = type("Holder", (), {"plugin": plugin})
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
@pytest.mark.parametrize("path", ["plugin", "holder.plugin"])
def test_load_takes_instances_with_evaluated_and_with_postponed_annotations(
    site: Any, future: str, path: str
) -> None:
    groups = {"dovetail.export": {"zip": f"planted_zip:{path}"}}
    site.add("acme", groups, planted_zip=future + INSTANCE)
    backend = Registry().load("export", "zip")
    assert list(backend.options_model("export").model_fields) == ["level"]
    assert backend.summary == "Zips with a level."


@pytest.mark.parametrize("annotation", ["", ": Any", ": 'Any'"])
def test_options_without_a_model_refuse_every_option(site: Any, annotation: str) -> None:
    body = f"@hookimpl\ndef dovetail_export(options{annotation}): ...\n"
    source = f"from typing import Any\n{HEAD}{body}"
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip=source)
    assert Registry().load("export", "zip").options_model("export") is PluginOptions


def test_load_reads_options_through_a_decorator(site: Any) -> None:
    source = f"""
import functools
{HEAD}
class Options(PluginOptions):
    level: int = 3

def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

@hookimpl
@logged
def dovetail_export(task, options: Options): ...
"""
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip=source)
    assert list(Registry().load("export", "zip").options_model("export").model_fields) == ["level"]


def test_other_names_with_the_prefix_are_left_alone_unless_they_are_functions(site: Any) -> None:
    source = f"{GOOD}import dovetail as dovetail_core\ndovetail_note = 'x'\n"
    site.add("acme", {"dovetail.export": {"zip": "planted_zip"}}, planted_zip=source)
    assert Registry().load("export", "zip").info.name == "zip"


def test_register_checks_as_load_does() -> None:
    class Plugin:
        def dovetail_export(self, task: object) -> None: ...

    with pytest.raises(
        BrokenPluginError,
        match=r"plugin 'zip' \(this session\) dovetail_export \(.*test_loading.py:\d+\): is",
    ):
        Registry().register(Plugin(), hook="export", name="zip")


def test_register_takes_a_module_made_by_hand() -> None:
    module = types.ModuleType("made_by_hand", "Made by hand.")

    @hookimpl
    def dovetail_export(task: object) -> None: ...

    module.dovetail_export = dovetail_export  # type: ignore[attr-defined]
    registry = Registry()
    registry.register(module, hook="export", name="hand")
    assert registry.load("export", "hand").summary == "Made by hand."


def test_a_plugin_that_writes_to_stdout_while_it_is_imported_is_imported_only_when_named(
    site: Any,
) -> None:
    site.add(
        "acme", {"dovetail.export": {"loud": "planted_loud"}}, planted_loud=f"print('loud')\n{GOOD}"
    )
    code = "from dovetail.registry import default_registry; default_registry().list_plugins()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


def test_load_refuses_an_api_that_is_too_old(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("OLDEST_API_VERSION", 3), ("API_VERSION", 4)):
        monkeypatch.setattr(f"dovetail.registry.loading.{name}", version)
    message = refusal(site, f"{GOOD}dovetail_api = 2\n")
    assert "was written for API 2 of dovetail; this dovetail takes 3 to 4" in message
    assert message.endswith("pip install --upgrade acme")


@pytest.mark.parametrize("wish", ["'upload'", "[1]", "None"])
def test_load_refuses_an_order_that_names_nobody(site: Any, wish: str) -> None:
    message = refusal(site, f"{GOOD}dovetail_before = {wish}\n")
    assert f"dovetail_before is {ast.literal_eval(wish)!r}" in message
    assert "expected a tuple of wrappers' names" in message


def test_load_reads_the_order_a_wrapper_wants(site: Any) -> None:
    source = (
        "from dovetail import hookimpl\n"
        "dovetail_before, dovetail_after = ('upload',), ['clock', 'lock']\n"
        "@hookimpl(wrapper=True)\n"
        "def dovetail_export(task): return (yield)\n"
    )
    site.add("acme", {"dovetail.plugins": {"planted": "planted_wish"}}, planted_wish=source)
    backend = Registry().load("wrap", "planted")
    assert (backend.before, backend.after) == (("upload",), ("clock", "lock"))


@pytest.mark.parametrize(
    ("source", "kind"),
    [("x = 1\nraise RuntimeError('no')\n", "RuntimeError"), ("x = 1\ndef f(:", "SyntaxError")],
)
def test_load_tells_where_a_plugin_fails_while_it_is_imported(
    site: Any, source: str, kind: str
) -> None:
    message = refusal(site, source)
    assert f"does not import: {kind}: " in message
    assert "planted_broken.py:2)" in message
