"""Fifty plugins that mean harm are installed; a run that names none of them does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import PluginConflictError
from dovetail.preflight import check_config
from dovetail.registry import Registry
from dovetail.registry.lock import read_lock
from dovetail.run.tracking import read_records

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "docs" / "examples" / "digits" / "digits.toml"
GROUPS = ("compile", "collate", "accumulate", "log", "export", "plugins")

# Whatever is imported leaves a mark, so that the test sees who was.
MARK = """
import os, pathlib
pathlib.Path(os.environ["MARKS"], __name__).touch()
"""

KINDS = {
    "fails": "raise ImportError('no')",
    "exits": "import sys; sys.exit(7)",
    "kills": "import os; os._exit(9)",
    "sleeps": "import time; time.sleep(5)",
    "patches": """
import random, torch
torch.manual_seed = torch.nn.functional.cross_entropy = lambda *a, **k: torch.tensor(1.0)
torch.optim.Optimizer.step = lambda *a, **k: None
random.seed(666)
""",
    "signature": """
from dovetail import hookimpl
@hookimpl
def dovetail_collate(task, options, nonsense): ...
@hookimpl
def dovetail_colate(task): ...
def dovetail_log(run): ...
""",
    "shouts": "import sys; print('HOSTILE' * 200_000); print('HOSTILE' * 200_000, file=sys.stderr)",
    "newer": "dovetail_api = 99",
    "warns": "import warnings; warnings.warn('HOSTILE'); warnings.simplefilter('error')",
    "claims": """
from dovetail import hookimpl
@hookimpl
def dovetail_collate(task): return lambda samples: 1 / 0
@hookimpl
def dovetail_accumulate(model): return None
""",
}

NAMES = ("text", "tabular", "wandb", "inductor", "same")
"""Names of built-ins that the run does not use, and one that all of them claim."""


def install(site: Path, name: str, entry_points: str) -> None:
    """Write the metadata of a distribution, as an installer leaves them."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def plant(site: Path) -> int:
    """Install five distributions of each kind; return how many."""
    planted = [(kind, name) for kind in KINDS for name in NAMES]
    for index, (kind, name) in enumerate(planted):
        module = f"hostile_{kind}_{name}"
        (site / f"{module}.py").write_text(MARK + KINDS[kind])
        entries = [f"[dovetail.{group}]\n{name} = {module}\n" for group in GROUPS]
        install(site, f"hostile-{index}", "".join(entries))
    return len(planted)


def dovetail(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail", *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, env=settings, capture_output=True, text=True, check=False
    )


def train(folder: Path, **environment: str) -> tuple[str, list[Mapping[str, Any]], Any]:
    """Train digits for an epoch; return the output, the records and the lock."""
    folder.mkdir()
    overrides = ("train.epochs=1", 'export.use=["pytorch"]', "run.dir=runs", "run.id=one")
    done = dovetail("train", str(DIGITS), *overrides, cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "digits" / "one"
    timed = ("time", "elapsed", "per_s", "seconds", "_s")
    records = [
        {k: v for k, v in record.get("metrics", {}).items() if not k.endswith(timed)}
        for record in read_records(run)
        if record["kind"] != "system"
    ]
    digest = json.loads((run / "plugins.lock.json").read_text())["digest"]
    assert read_lock(run)
    return done.stdout + done.stderr, records, digest


@pytest.mark.slow
def test_fifty_hostile_plugins_change_nothing_in_a_run_that_names_none(tmp_path: Path) -> None:
    site, marks = tmp_path / "site", tmp_path / "marks"
    site.mkdir()
    marks.mkdir()
    assert plant(site) == 50
    _, alone, alone_digest = train(tmp_path / "alone")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    beside = {"PYTHONPATH": path, "MARKS": str(marks)}
    printed, among_them, digest = train(tmp_path / "beside", **beside)
    losses = [record["train/loss"] for record in alone if "train/loss" in record]
    assert len(losses) >= 11
    assert among_them == alone
    assert digest == alone_digest
    assert "HOSTILE" not in printed
    listing = dovetail("plugins", "--json", cwd=tmp_path, **beside)
    assert listing.returncode == 0, listing.stderr
    listed = {row["distribution"] for row in json.loads(listing.stdout)}
    assert len([name for name in listed if name.startswith("hostile-")]) == 50
    assert dovetail("--help", cwd=tmp_path, **beside).returncode == 0
    assert list(marks.iterdir()) == []


def test_backends_that_nobody_chose_stay_ours_whoever_takes_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, (group, name) in enumerate([("collate", "vision"), ("accumulate", "exact")]):
        install(tmp_path, f"rival-{index}", f"[dovetail.{group}]\n{name} = no_such_module\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    tables: dict[str, Any] = {
        "task": {"modality": "vision"},
        "accumulate": {"exact": {"steps": 2}},
        "collate": {"vision": {"normalize": False}},
    }
    checked = check_config(tables, registry=Registry())
    rows = {row["hook"]: row for row in checked.lock()}
    assert (rows["collate"]["name"], rows["collate"]["distribution"]) == ("vision", "dovetail")
    assert (rows["accumulate"]["name"], rows["accumulate"]["distribution"]) == ("exact", "dovetail")
    options = {
        hook: dict(chosen)
        for hook, backends in checked.backends.items()
        for chosen in backends.values()
    }
    assert options["accumulate"]["steps"] == 2
    assert options["collate"]["normalize"] is False
    tables["accumulate"]["use"] = "exact"
    with pytest.raises(PluginConflictError, match='Write "dovetail:exact" or "rival-1:exact"'):
        check_config(tables, registry=Registry())
