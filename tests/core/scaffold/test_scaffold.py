"""The first version of a plugin: its names, its files, and nothing half-made."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dovetail import API_VERSION, __version__
from dovetail.errors import ConfigError
from dovetail.registry import ROLES, Role
from dovetail.scaffold import config_example, naming, write_plugin, writing
from dovetail.scaffold.naming import MAX_LENGTH, PluginNames

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LONGEST = "n" * (MAX_LENGTH - 2) + "-n"
FILES = {
    ".github/workflows/ci.yml",
    ".gitignore",
    "README.md",
    "pyproject.toml",
    "src/dovetail_two_words/__init__.py",
    "src/dovetail_two_words/py.typed",
    "tests/test_conformance.py",
    "tests/test_two_words.py",
    "tox.ini",
}


def texts_of(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files}


def write_all(parent: Path, name: str) -> list[Path]:
    """Write a plugin of each hook, each below a folder of the hook's name."""
    folders = []
    for role in ROLES:
        (parent / role).mkdir(parents=True)
        folders.append(write_plugin(name, role, parent / role))
    return folders


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("role", ROLES)
def test_write_plugin_makes_every_file_of_a_distribution(role: Role, tmp_path: Path) -> None:
    folder = write_plugin("two-words", role, tmp_path)
    assert folder == tmp_path / "dovetail-two-words"
    texts = texts_of(folder)
    assert set(texts) == FILES
    assert [name for name, text in texts.items() if not text] == ["src/dovetail_two_words/py.typed"]


def test_write_plugin_takes_the_name_of_the_distribution_too(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    short = write_plugin("scaled", "collate", tmp_path)
    long = write_plugin("dovetail-scaled", "collate", tmp_path / "other")
    assert long.name == short.name
    assert texts_of(long) == texts_of(short)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["x", "two-words", LONGEST])
def test_templates_leave_no_placeholder(name: str, role: Role, tmp_path: Path) -> None:
    for path, text in texts_of(write_plugin(name, role, tmp_path)).items():
        assert "$" not in text.replace("${{ matrix.", ""), path
        assert ".template" not in path


@pytest.mark.parametrize("role", ROLES)
def test_python_of_a_plugin_compiles_and_states_the_api(role: Role, tmp_path: Path) -> None:
    texts = texts_of(write_plugin("two-words", role, tmp_path))
    for path, text in texts.items():
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert f"\ndovetail_api = {API_VERSION}\n" in texts["src/dovetail_two_words/__init__.py"]


@pytest.mark.parametrize("role", ROLES)
def test_pyproject_declares_the_plugin_and_what_it_needs(role: Role, tmp_path: Path) -> None:
    texts = texts_of(write_plugin("two-words", role, tmp_path))
    tables = tomllib.loads(texts["pyproject.toml"])
    group = "dovetail.plugins" if role == "wrap" else f"dovetail.{role}"
    assert tables["project"]["entry-points"] == {group: {"two-words": "dovetail_two_words"}}
    assert tables["project"]["requires-python"] == ">=3.10"
    (needed,) = map(Requirement, tables["project"]["dependencies"])
    (tested,) = map(Requirement, tables["dependency-groups"]["test"])
    assert (needed.name, needed.extras) == ("dovetail", set())
    assert (tested.name, tested.extras) == ("dovetail", {"testing"})
    assert needed.specifier == tested.specifier
    assert needed.specifier.contains(__version__, prereleases=True)
    summary = texts["src/dovetail_two_words/__init__.py"].partition("\n")[0]
    assert summary == f'"""{tables["project"]["description"]}.'


@pytest.mark.parametrize(
    ("version", "specifier"),
    [("1.2.0", ">=1.2.0"), ("1.3.0rc1", ">=1.3.0rc1"), ("1.3.0.dev4+gabc.d2", ">=1.3.0.dev4")],
)
def test_pyproject_asks_for_the_running_version_or_newer(
    version: str, specifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "__version__", version)
    text = (write_plugin("x", "log", tmp_path) / "pyproject.toml").read_text()
    (requirement,) = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    assert str(requirement.specifier) == specifier
    assert requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("role", ROLES)
def test_readme_shows_a_config_that_parses(role: Role, tmp_path: Path) -> None:
    text = (write_plugin("two-words", role, tmp_path) / "README.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block == config_example(PluginNames("two-words"), role)
    section, key = ("run", "plugins") if role == "wrap" else (role, "use")
    chosen = tomllib.loads(block)[section]
    assert "two-words" in chosen[key]
    assert role == "wrap" or chosen["two-words"]


def test_ci_runs_every_environment_of_tox(tmp_path: Path) -> None:
    texts = texts_of(write_plugin("x", "wrap", tmp_path))
    ci = re.findall(r"env: (\w+)", texts[".github/workflows/ci.yml"])
    versions = re.search(r"py3\{([\d,]+)\}", texts["tox.ini"])
    assert versions
    assert ci == ["lint", "type", *(f"py3{minor}" for minor in versions[1].split(","))]


@pytest.mark.skipif(not is_installed("ruff"), reason="ruff is in the lint environment")
@pytest.mark.parametrize("name", ["x", LONGEST])
def test_plugins_are_clean_for_ruff_whatever_their_name(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, name)
    for arguments in (["check"], ["format", "--check", "--diff"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("mypy"), reason="mypy is in the type environment")
def test_plugins_are_clean_for_mypy(tmp_path: Path) -> None:
    roots = []
    for role in ROLES:
        # The six tests/test_conformance.py are told apart by folders that are names of packages.
        roots.append(write_plugin(f"typed-{role}", role, tmp_path).rename(tmp_path / role))
    command = [sys.executable, "-m", "mypy", "--config-file", str(roots[0] / "pyproject.toml")]
    command += ["--explicit-package-bases", "--cache-dir", str(tmp_path / "cache")]
    command += [str(root / part) for root in roots for part in ("src", "tests")]
    bases = os.pathsep.join(map(str, [tmp_path, *(root / "src" for root in roots)]))
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": bases},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no issues found in 18 source files" in result.stdout


@pytest.mark.parametrize(
    ("name", "found", "action"),
    [
        ("Scaled", "cannot name a distribution", "Take 'scaled'."),
        ("myScaled", "cannot name a distribution", "Take 'my-scaled'."),
        ("my_scaled", "cannot name a distribution", "Take 'my-scaled'."),
        ("3d", "cannot name a distribution", "a letter first."),
        ("a--b", "cannot name a distribution", "Take 'a-b'."),
        ("../up", "cannot name a distribution", "Take 'up'."),
        ("naïve", "cannot name a distribution", "a letter first."),
        ("", "cannot name a distribution", "a letter first."),
        ("dovetail-", "cannot name a distribution", "a letter first."),
        ("a\n", "cannot name a distribution", "Take 'a'."),
        (LONGEST + "n", f"has {MAX_LENGTH + 1} characters", f"at most {MAX_LENGTH}."),
        ("off", "has a meaning of its own in a config", "another name."),
        ("dovetail-auto", "has a meaning of its own in a config", "another name."),
        ("use", "is a key of every hook's section", "another name."),
        ("plugins", "would be the module dovetail_plugins", "another name."),
        ("conformance", "tests/test_conformance.py", "another name."),
        ("mlflow", "is taken: dovetail-mlflow is a distribution", "another name."),
    ],
)
def test_name_that_cannot_be_is_refused_with_what_can(
    name: str, found: str, action: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        write_plugin(name, "collate", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"plugin name {name!r}: ")
    assert found in message
    assert message.endswith(action)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", naming._RUN_FOLDERS)
def test_name_of_a_folder_of_the_run_is_refused_for_a_tracker_alone(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a folder of every run"):
        write_plugin(name, "log", tmp_path)
    assert write_plugin(name, "export", tmp_path).is_dir()


def test_name_of_an_installed_plugin_is_refused_for_its_hook_alone(
    site: Callable[..., None], tmp_path: Path
) -> None:
    site.add("other-tools", {"dovetail.log": {"rows": "other"}})
    with pytest.raises(ConfigError, match=r"the installed other-tools 1\.2 offers it for the hook"):
        write_plugin("rows", "log", tmp_path)
    assert write_plugin("rows", "export", tmp_path).is_dir()


def test_name_may_be_that_of_the_author_s_own_installed_plugin(
    site: Callable[..., None], tmp_path: Path
) -> None:
    site.add("Dovetail_Rows", {"dovetail.log": {"rows": "dovetail_rows"}})
    assert write_plugin("rows", "log", tmp_path).is_dir()


def test_unknown_hook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 'colate'; expected one of compile, collate"):
        write_plugin("x", "colate", tmp_path)  # type: ignore[arg-type]


def test_folder_with_files_is_left_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "dovetail-x"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="has files in it; expected a new folder"):
        write_plugin("x", "log", tmp_path)
    assert texts_of(tmp_path) == {"dovetail-x/mine.txt": "mine"}


def test_file_in_the_place_of_the_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "dovetail-x").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and is no folder"):
        write_plugin("x", "log", tmp_path)
    assert texts_of(tmp_path) == {"dovetail-x": "mine"}


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "dovetail-x").mkdir()
    assert (write_plugin("x", "log", tmp_path) / "pyproject.toml").is_file()


def test_parent_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent' is no folder"):
        write_plugin("x", "log", tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_text = Path.write_text

    def fill_the_disk(path: Path, text: str, **settings: str) -> int:
        if len(written) == 4:
            raise OSError(28, os.strerror(28))
        written.append(path)
        return write_text(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        write_plugin("x", "log", tmp_path)
    assert len(written) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_folder_may_be_entered_by_those_who_may_enter_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    folder = write_plugin("x", "log", tmp_path)
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
