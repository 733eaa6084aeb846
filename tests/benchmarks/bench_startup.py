"""CPU time of `dovetail --help` and `dovetail plugins`, against that of a bare interpreter.

Builds virtual environments that hold nothing but what these two commands import, and 100 or 300
further distributions, of which ten or all offer a plugin. The commands are measured in turns with
`python -c pass`, over all environments, so that a busy machine slows all of them alike. A plugin's
module leaves a mark when it is imported; a mark ends the benchmark.

    python tests/benchmarks/bench_startup.py [--runs 21]
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

PACKAGES = ("click", "pluggy")
COPIED = (*PACKAGES, "dovetail")
ENVIRONMENTS = {"100": (100, 10), "300": (300, 10), "300, all with plugins": (300, 300)}
"""Distributions, and how many of them offer a plugin."""

PER_DISTRIBUTION_MS = 0.05
LIMITS = {"--help": 6.0, "plugins": 12.0}

SCRIPT = """\
import sys
from dovetail.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def build_environment(
    directory: Path, num_distributions: int, num_with_plugins: int
) -> tuple[Path, Path]:
    """Make a virtual environment; return its interpreter and the console script."""
    venv.create(directory, symlinks=True, with_pip=False)
    python = directory / "bin" / "python"
    site = next((directory / "lib").glob("python*/site-packages"))
    for name in PACKAGES:
        source = metadata.distribution(name).locate_file(name)
        shutil.copytree(str(source), site / name)
    root = Path(__file__).resolve().parents[2]
    shutil.copytree(root / "core" / "dovetail", site / "dovetail")
    for name in COPIED:
        copy_metadata(name, site)
    required = [r.split(";")[0] for r in metadata.requires("dovetail") or []]
    names = [n for n in (strip(r) for r in required) if n not in COPIED]
    names = list(dict.fromkeys(names))
    names += [f"filler-{i}" for i in range(num_distributions - len(names) - len(COPIED))]
    for index, name in enumerate(names):
        write_distribution(site, name, index, offers_plugin=index < num_with_plugins)
    (site / "fake.py").write_text(f"open({str(directory / 'imported')!r}, 'w').close()\n")
    subprocess.run([str(python), "-m", "compileall", "-q", str(site)], check=True)
    script = directory / "bin" / "dovetail"
    script.write_text(SCRIPT, encoding="utf-8")
    return python, script


def strip(requirement: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else " " for c in requirement).split()[0]


def copy_metadata(name: str, site: Path) -> None:
    distribution = metadata.distribution(name)
    target = site / f"{name}-{distribution.version}.dist-info"
    target.mkdir()
    for file in ("METADATA", "entry_points.txt"):
        text = distribution.read_text(file)
        if text is not None:
            (target / file).write_text(text, encoding="utf-8")


def write_distribution(site: Path, name: str, index: int, *, offers_plugin: bool) -> None:
    """Write the metadata of a distribution, with a README of an ordinary length."""
    target = site / f"{name.replace('-', '_')}-1.{index}.dist-info"
    target.mkdir()
    readme = "A package that does something, at some length.\n" * 100
    (target / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.{index}\n"
        f"Requires-Dist: click\nRequires-Dist: absent; extra == 'x'\n\n{readme}",
        encoding="utf-8",
    )
    if offers_plugin:
        text = f"[console_scripts]\nx{index} = x:main\n\n[dovetail.log]\nfake{index} = fake\n"
        (target / "entry_points.txt").write_text(text, encoding="utf-8")
    elif index % 3 == 0:
        (target / "entry_points.txt").write_text(f"[console_scripts]\nx{index} = x:main\n")


def cpu_ms(command: list[str]) -> float:
    """Return user and system time of one run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DOVETAIL"))}
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used * 1e3


def measure(folder: Path, num_runs: int) -> dict[tuple[str, str], list[float]]:
    """Return the times of every command in every environment."""
    commands: dict[tuple[str, str], list[str]] = {}
    for name, (num_distributions, num_with_plugins) in ENVIRONMENTS.items():
        home = folder / name
        python, script = build_environment(home, num_distributions, num_with_plugins)
        commands[name, "python -c pass"] = [str(python), "-c", "pass"]
        for command in LIMITS:
            commands[name, command] = [str(python), str(script), command]
    commands["100", "plugins, the control"] = commands["100", "plugins"]
    for command in commands.values():
        cpu_ms(command)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in commands}
    for _ in range(num_runs):
        for key, command in commands.items():
            times[key].append(cpu_ms(command))
    marks = list(folder.glob("*/imported"))
    if marks:
        raise SystemExit(f"a plugin's module was imported: {marks}")
    return times


def print_costs(times: dict[tuple[str, str], list[float]]) -> None:
    """Print what each further distribution costs `dovetail plugins`, from paired runs."""
    base = times["100", "plugins"]
    rows = {
        "none more, the control": ("100", "plugins, the control", 200),
        "no plugin": ("300", "plugins", 200),
        "200 more, 290 more plugins": ("300, all with plugins", "plugins", 200),
    }
    print(
        "\n| `dovetail plugins`, each distribution beyond 100 | CPU ms more | quartiles | limit |"
    )
    print("|---|---|---|---|")
    for name, (environment, command, count) in rows.items():
        more = [(b - a) / count for a, b in zip(base, times[environment, command], strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {PER_DISTRIBUTION_MS:g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), arguments.runs)
    print(f"Python {sys.version.split()[0]}, {arguments.runs} runs each, CPU ms")
    print("| distributions | command | median | quartiles | ratio to bare | limit |")
    print("|---|---|---|---|---|---|")
    for (environment, command), values in times.items():
        bare = statistics.median(times[environment, "python -c pass"])
        low, middle, high = statistics.quantiles(values, n=4)
        limit = f"{LIMITS[command]:g}" if command in LIMITS else "-"
        row = [environment, command, f"{middle:.1f}", f"{low:.1f}-{high:.1f}"]
        print(f"| {' | '.join([*row, f'{middle / bare:.1f}', limit])} |")
    print_costs(times)


if __name__ == "__main__":
    main()
