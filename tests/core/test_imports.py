from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.errors import ConfigError
from dovetail.imports import call_factory, import_object

WHERE = "config model.factory"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config file's folder; what it puts on the path and imports is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def message_of(path: str, folder: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        import_object(path, where=WHERE, search_dir=folder)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value)


def test_import_object_finds_installed_and_nested_names() -> None:
    import os.path

    assert import_object("os.path:join", where=WHERE) is os.path.join
    assert import_object("pathlib:Path.cwd", where=WHERE) == Path.cwd


def test_import_object_finds_a_module_beside_the_config(folder: Path) -> None:
    (folder / "beside_digits.py").write_text("def build(): return 7\n")
    assert import_object("beside_digits:build", where=WHERE, search_dir=folder)() == 7


def test_import_object_takes_the_module_of_this_config_and_not_of_another(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "same_name.py").write_text(f"NAME = {name!r}\n")
    for name in ("one", "two", "one"):
        found = import_object("same_name:NAME", where=WHERE, search_dir=folder / name)
        assert found == name


def test_import_object_imports_the_same_module_once(folder: Path) -> None:
    (folder / "only_once.py").write_text("MADE = object()\n")
    first = import_object("only_once:MADE", where=WHERE, search_dir=folder)
    assert import_object("only_once:MADE", where=WHERE, search_dir=folder) is first


def test_import_object_finds_packages_and_leaves_namesakes_elsewhere_alone(folder: Path) -> None:
    import json

    (folder / "inner_pack").mkdir()
    (folder / "inner_pack" / "__init__.py").write_text("")
    (folder / "inner_pack" / "deep.py").write_text("VALUE = 3\n")
    assert import_object("inner_pack.deep:VALUE", where=WHERE, search_dir=folder) == 3
    assert import_object("json:loads", where=WHERE, search_dir=folder) is json.loads


def test_import_object_is_found_by_the_workers_of_a_spawned_process(folder: Path) -> None:
    (folder / "spawned_data.py").write_text("class Item:\n    value = 4\n")
    script = folder / "script.py"
    script.write_text(
        "import multiprocessing, pathlib\n"
        "from dovetail.imports import import_object\n"
        "def look(item): return item.value\n"
        "if __name__ == '__main__':\n"
        "    folder = pathlib.Path(__file__).parent / 'config'\n"
        "    item = import_object('spawned_data:Item', where='x', search_dir=folder)()\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.map(look, [item]) == [4]\n"
    )
    (folder / "config").mkdir()
    (folder / "spawned_data.py").rename(folder / "config" / "spawned_data.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_object_says_where_it_looked_when_there_is_no_module(folder: Path) -> None:
    message = message_of("nosuch_digits:build", folder)
    assert "there is no module 'nosuch_digits'" in message
    assert str(folder) in message
    assert "Put the module beside the config file" in message


def test_import_object_names_the_missing_submodule() -> None:
    assert "there is no module 'os.nosuch'" in message_of("os.nosuch:build")


@pytest.mark.parametrize("path", ["a..b:c", "os..path:c", ".b:c"])
def test_import_object_refuses_odd_module_paths(path: str) -> None:
    message_of(path)


def test_import_object_names_the_package_that_the_users_module_needs(folder: Path) -> None:
    (folder / "needs_more.py").write_text("import nosuch_library.part\n")
    message = message_of("needs_more:build", folder)
    assert "needs the package 'nosuch_library', which is not installed" in message


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("from os import nosuch", "ImportError: cannot import name 'nosuch'"),
    ],
)
def test_import_object_tells_a_module_that_raises(folder: Path, source: str, shown: str) -> None:
    (folder / "raises_now.py").write_text(source)
    message = message_of("raises_now:build", folder)
    assert f"'raises_now' does not import: {shown}" in message


def test_import_object_offers_the_nearest_name() -> None:
    message = message_of("os.path:joni")
    assert "'os.path' has no 'joni'" in message
    assert "Did you mean 'join'?" in message


@pytest.mark.parametrize("path", ["os.path", "os.path:", "os.path:join."])
def test_import_object_refuses_a_path_without_an_object(path: str) -> None:
    message_of(path)


def test_call_factory_passes_the_arguments() -> None:
    made = call_factory(
        "fractions:Fraction", {"numerator": 3}, where="config model", search_dir=None
    )
    assert made == 3


def test_call_factory_names_arguments_that_do_not_fit(folder: Path) -> None:
    (folder / "takes_width.py").write_text("def build(width: int, depth: int = 2): ...\n")
    with pytest.raises(ConfigError) as caught:
        call_factory("takes_width:build", {"widht": 3}, where="config model", search_dir=folder)
    message = str(caught.value)
    assert message.startswith("config model.kwargs: 'takes_width:build' does not take")
    assert "build(width: int, depth: int = 2)" in message or "build(width: 'int'" in message


def test_call_factory_refuses_what_is_no_function() -> None:
    with pytest.raises(ConfigError, match=r"'os:sep' is a str; expected a function or a class"):
        call_factory("os:sep", {}, where="config model", search_dir=None)


def test_call_factory_calls_builtins_without_a_signature() -> None:
    assert call_factory("builtins:dict", {"a": 1}, where="config data", search_dir=None) == {"a": 1}


def test_call_factory_lets_a_type_error_inside_the_factory_through(folder: Path) -> None:
    (folder / "fails_inside.py").write_text("def build(): return 1 + 'a'\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        call_factory("fails_inside:build", {}, where="config model", search_dir=folder)
