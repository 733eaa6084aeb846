from __future__ import annotations

import os

import pytest

from dovetail.bundle import open_bundle
from dovetail.bundle.manifest import parse_manifest, render_manifest
from dovetail.errors import BundleError

FILES = [
    "README.md",
    "artifacts/linear.npz",
    "configs/task_spec.json",
    "configs/training_config.json",
    "golden.npz",
    "manifest.json",
    "requirements.txt",
]


def test_open_bundle_lists_what_is_there(built):
    opened = open_bundle(built)
    assert sorted([*opened.manifest.files, "manifest.json"]) == FILES
    assert opened.artifact_path("linear") == built / "artifacts" / "linear.npz"


def test_open_bundle_follows_a_link_to_the_whole_bundle(built, tmp_path):
    (tmp_path / "latest").symlink_to(built)
    assert open_bundle(tmp_path / "latest").manifest.files


@pytest.mark.parametrize("name", FILES)
def test_open_bundle_finds_one_changed_byte(name, bundle):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_open_bundle_finds_a_missing_file(name, bundle):
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_open_bundle_finds_an_appended_byte(name, bundle):
    with (bundle / name).open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["extra.py", "artifacts/__pycache__/digits.pyc", ".hidden"])
def test_open_bundle_refuses_an_unknown_file(name, bundle):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name}: is not in the manifest"):
        open_bundle(bundle)


def test_open_bundle_refuses_a_symbolic_link_to_the_same_bytes(bundle, tmp_path):
    outside = tmp_path / "golden.npz"
    os.replace(bundle / "golden.npz", outside)
    (bundle / "golden.npz").symlink_to(outside)
    with pytest.raises(BundleError, match=r"golden\.npz: is a symbolic link"):
        open_bundle(bundle)


def test_open_bundle_refuses_a_linked_folder(bundle, tmp_path):
    os.replace(bundle / "configs", tmp_path / "configs")
    (bundle / "configs").symlink_to(tmp_path / "configs")
    with pytest.raises(BundleError, match="configs: is a symbolic link"):
        open_bundle(bundle)


def test_open_bundle_refuses_a_hard_link(bundle, tmp_path):
    os.link(bundle / "golden.npz", tmp_path / "elsewhere.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: has 2 hard links.*cp -r"):
        open_bundle(bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_open_bundle_refuses_a_pipe(bundle):
    (bundle / "golden.npz").unlink()
    os.mkfifo(bundle / "golden.npz")
    with pytest.raises(BundleError, match=r"golden\.npz: is no plain file"):
        open_bundle(bundle)


def test_open_bundle_refuses_an_artifact_the_files_do_not_list(bundle):
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    files = {n: e for n, e in manifest.files.items() if n != "artifacts/linear.npz"}
    changed = manifest.model_copy(update={"files": files})
    (bundle / "manifest.json").write_bytes(render_manifest(changed))
    (bundle / "artifacts" / "linear.npz").unlink()
    with pytest.raises(BundleError, match=r"format 'linear' names 'artifacts/linear\.npz'"):
        open_bundle(bundle)


def test_open_bundle_says_when_there_is_none(tmp_path):
    with pytest.raises(BundleError, match="is not there; expected the folder of a bundle"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a folder"):
        open_bundle(tmp_path / "file")


def test_artifact_path_suggests_the_format_that_was_meant(built):
    with pytest.raises(BundleError, match="Did you mean 'linear'"):
        open_bundle(built).artifact_path("liner")
