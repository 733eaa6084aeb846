"""A home for W&B; plugins of strangers: wheels, and environments to install them in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Properties are about values: how long an example takes says something about the machine alone.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Read when wandb is imported: no test may report home.
os.environ["WANDB_ERROR_REPORTING"] = "false"


@pytest.fixture(scope="module")
def wandb_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give wandb a home of its own, without a login and without settings."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        wandb.teardown()  # what an earlier test has left knows another environment
        yield home
        wandb.teardown()


PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.2.3"
dependencies = ["dovetail"]

[project.entry-points."dovetail.{hook}"]
{backend} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""


def run_python(python: Path | str, *arguments: str, cwd: Path) -> str:
    """Return what a fresh interpreter printed; its whole output is the message of a failure."""
    result = subprocess.run(
        [str(python), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def plugin_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builder of a one-module plugin distribution, without a network.

    `plugin_wheel(name, source, hook="collate")` returns the wheel of distribution `dovetail-<name>`
    1.2.3, whose module `dovetail_<name>` is offered as `<name>` for the hook.
    """

    def build(name: str, source: str, hook: str = "collate") -> Path:
        project = tmp_path_factory.mktemp(f"plugin-{name}")
        module = f"dovetail_{name}"
        (project / f"{module}.py").write_text(source)
        metadata = PYPROJECT.format(name=f"dovetail-{name}", hook=hook, backend=name, module=module)
        (project / "pyproject.toml").write_text(metadata)
        run_python(sys.executable, "-m", "hatchling", "build", "-t", "wheel", cwd=project)
        (wheel,) = (project / "dist").glob("*.whl")
        return wheel

    return build


@pytest.fixture
def plugin_environment(tmp_path: Path) -> Callable[..., Path]:
    """Maker of a virtual environment that has the given wheels and all that this one has.

    `plugin_environment(wheel, ...)` returns its interpreter. This environment's packages are
    reached through a `.pth` file, so that nothing heavy is installed again.
    """

    def make(*wheels: Path) -> Path:
        home = tmp_path / "environment"
        venv.create(home, symlinks=os.name != "nt")
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        site = run_python(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
        )
        # `addsitedir` reads the `.pth` files there too: an editable install is reached as well.
        here = sysconfig.get_path("purelib")
        link = Path(site.strip()) / "outer.pth"
        link.write_text(f"import site; site.addsitedir({here!r})\n")
        install = ("-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps")
        if wheels:
            run_python(sys.executable, *install, *map(str, wheels), cwd=tmp_path)
        return python

    return make
