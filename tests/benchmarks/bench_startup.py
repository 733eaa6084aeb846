"""CPU time of `dovetail --help` and `dovetail plugins`, against that of a bare interpreter.

Builds a virtual environment that holds nothing but what these two commands import, and 100 (or
300) distributions of which ten offer plugins, and measures the commands in turns with
`python -c pass`, so that a busy machine slows all of them alike.

    python tests/benchmarks/bench_startup.py [--runs 21] [--distributions 100 300]
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
NUM_WITH_PLUGINS = 10
LIMITS = {"--help": 6.0, "plugins": 12.0}

SCRIPT = """\
import sys
from dovetail.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def build_environment(directory: Path, num_distributions: int) -> tuple[Path, Path]:
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
        write_distribution(site, name, index)
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


def write_distribution(site: Path, name: str, index: int) -> None:
    """Write the metadata of a distribution, with a README of an ordinary length."""
    target = site / f"{name.replace('-', '_')}-1.{index}.dist-info"
    target.mkdir()
    readme = "A package that does something, at some length.\n" * 100
    (target / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.{index}\n"
        f"Requires-Dist: click\nRequires-Dist: absent; extra == 'x'\n\n{readme}",
        encoding="utf-8",
    )
    if index < NUM_WITH_PLUGINS:
        text = f"[console_scripts]\nx{index} = x:main\n\n[dovetail.log]\nfake{index} = fake.log\n"
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


def measure(num_distributions: int, num_runs: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        python, script = build_environment(Path(folder), num_distributions)
        commands = {
            "python -c pass": [str(python), "-c", "pass"],
            "--help": [str(python), str(script), "--help"],
            "plugins": [str(python), str(script), "plugins"],
        }
        for command in commands.values():
            cpu_ms(command)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(num_runs):
            for name, command in commands.items():
                times[name].append(cpu_ms(command))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--distributions", type=int, nargs="+", default=[100, 300])
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {arguments.runs} runs each, CPU ms")
    print("| distributions | command | median | quartiles | ratio to bare | limit |")
    print("|---|---|---|---|---|---|")
    for count in arguments.distributions:
        times = measure(count, arguments.runs)
        bare = statistics.median(times["python -c pass"])
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            limit = f"{LIMITS[name]:g}" if name in LIMITS else "-"
            ratio = f"{middle / bare:.1f}"
            print(f"| {count} | {name} | {middle:.1f} | {low:.1f}-{high:.1f} | {ratio} | {limit} |")


if __name__ == "__main__":
    main()
