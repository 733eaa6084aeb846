from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dovetail.bundle import verify_bundle
from dovetail.bundle.manifest import describe_file, parse_manifest, render_manifest
from dovetail.errors import BundleError


def sign_again(bundle):
    """Make the digests fit the files, as whoever changes a bundle on purpose would."""
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    files = {name: describe_file(bundle / name) for name in manifest.files}
    changed = manifest.model_copy(update={"files": files})
    (bundle / "manifest.json").write_bytes(render_manifest(changed))


def test_verify_bundle_runs_every_format_again(built, exporters):
    report = verify_bundle(built)
    assert report.is_ok
    (linear,) = report.formats
    assert linear.format == "linear"
    assert linear.max_error <= linear.limit == 1e-5
    assert linear.batch_sizes == (1, 2)


def test_verify_bundle_leaves_the_bundle_as_it_was(bundle, exporters):
    before = sorted(p.name for p in bundle.rglob("*"))
    verify_bundle(bundle)
    assert sorted(p.name for p in bundle.rglob("*")) == before


def test_verify_bundle_opens_safely_first(bundle, exporters):
    (bundle / "README.md").write_text("something else")
    with pytest.raises(BundleError, match=r"README\.md"):
        verify_bundle(bundle)


def test_verify_bundle_finds_other_weights_under_fitting_digests(bundle, exporters):
    path = bundle / "artifacts" / "linear.npz"
    with np.load(path) as state:
        np.savez(path, weight=state["weight"] * np.float32(1.01), bias=state["bias"])
    sign_again(bundle)
    report = verify_bundle(bundle)
    assert not report.is_ok
    assert "at batch 1: differs from the trained model by" in report.formats[0].problem
    assert report.formats[0].max_error > 1e-3


def test_verify_bundle_finds_another_number_of_golden_cases(bundle, exporters):
    with np.load(bundle / "golden.npz") as golden:
        kept = {n: a for n, a in golden.items() if n.startswith("case0")}
    np.savez(bundle / "golden.npz", **kept)
    sign_again(bundle)
    report = verify_bundle(bundle)
    assert report.formats[0].problem == "there are 1 golden cases instead of 2"


def test_verify_bundle_says_when_a_plugin_is_not_installed(built, monkeypatch):
    paths = map(Path, os.environ["PYTHONPATH"].split(os.pathsep))
    kept = [str(p) for p in paths if not (p / "bundle_test_exporters.py").exists()]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(kept))
    report = verify_bundle(built)
    assert "no plugin is called 'linear'" in report.formats[0].problem


def test_verify_bundle_runs_the_formats_that_are_named(built, exporters):
    assert [f.format for f in verify_bundle(built, ["linear"]).formats] == ["linear"]
    with pytest.raises(BundleError, match=r"has no format 'liner'.*Did you mean 'linear'"):
        verify_bundle(built, ["liner"])


def test_verify_bundle_ignores_modules_in_the_working_folder(
    built, exporters, tmp_path, monkeypatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert verify_bundle(built).is_ok


@pytest.mark.parametrize("module", ["proof", "reader", "manifest"])
def test_opening_and_proving_import_no_torch(module):
    code = f"import sys, dovetail.bundle.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
