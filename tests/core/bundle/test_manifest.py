from __future__ import annotations

import json
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dovetail.bundle.manifest import Manifest, describe_file, parse_manifest, render_manifest
from dovetail.errors import BundleError
from dovetail.task import TaskSpec, TensorSpec


def make_manifest(**changes):
    fields = {
        "task": TaskSpec(name='a "task"\nöf mine', inputs=(TensorSpec(name="x"),)),
        "created": "2026-01-01T00:00:00+00:00",
        "precision": "float32",
        "inputs": (TensorSpec(name="x", shape=("batch", 3)),),
        "outputs": (TensorSpec(name="logits", shape=("batch", 2)),),
        "versions": {"torch": "2.7"},
        "artifacts": {
            "f": {
                "path": "artifacts/f",
                "files": ("artifacts/f",),
                "metadata": {},
                "options": {},
                "requirements": (),
                "carries_code": False,
                "export_seconds": 0.25,
                "limit": 1e-5,
                "cases": ({"sizes": {"batch": 3}, "max_error": 1.1920928955078125e-07},),
            }
        },
        "files": {"artifacts/f": {"sha256": "0" * 64, "size_bytes": 1}},
    }
    return Manifest.model_validate({**fields, **changes})


def test_manifest_comes_back_as_it_was_written():
    manifest = make_manifest()
    assert parse_manifest(render_manifest(manifest)) == manifest


@given(data=st.data())
def test_parse_manifest_sees_any_changed_byte(data):
    written = render_manifest(make_manifest())
    place = data.draw(st.integers(0, len(written) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != written[place]))
    changed = written[:place] + bytes([value]) + written[place + 1 :]
    with pytest.raises(BundleError):
        parse_manifest(changed)


@pytest.mark.parametrize("extra", [b" ", b"\n", b"{}"])
def test_parse_manifest_sees_any_added_byte(extra):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        parse_manifest(render_manifest(make_manifest()) + extra)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{}"])
def test_parse_manifest_refuses_what_is_no_manifest(data):
    with pytest.raises(
        BundleError, match=r"manifest\.json: .*; expected .*\. Get the bundle again"
    ):
        parse_manifest(data)


def test_parse_manifest_names_the_version_it_lacks():
    fields = json.loads(render_manifest(make_manifest()))
    newer = json.dumps({**fields, "schema_version": 2}).encode()
    with pytest.raises(
        BundleError, match=r"version 2; expected at most 1. Install a newer dovetail"
    ):
        parse_manifest(newer)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../b", "a//b", "./a", "C:\\x", "C:x", "a\\b", "", "manifest.json"],
)
def test_manifest_refuses_names_outside_the_bundle(name):
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    with pytest.raises(ValueError, match="not the name of a file inside the bundle"):
        make_manifest(files={name: entry})


@given(st.text(string.ascii_letters + string.digits + " _-.'\"", min_size=1))
def test_manifest_takes_plain_names(name):
    assume(name not in (".", ".."))
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    assert f"a/{name}" in make_manifest(files={f"a/{name}": entry}).files


def test_describe_file_measures_what_is_there(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    entry = describe_file(tmp_path / "f")
    assert entry.size_bytes == 3
    assert entry.sha256.startswith("ba7816bf")
