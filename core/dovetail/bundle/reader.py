"""Opens a bundle safely: names, links, sizes and digests first, contents afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dovetail.bundle.manifest import FILE_NAME, Manifest, describe_file, parse_manifest
from dovetail.errors import BundleError, build_message, did_you_mean

_MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there and all as they were written."""

    path: Path
    manifest: Manifest

    def artifact_path(self, format_name: str) -> Path:
        """Return the file that the format's runtime opens.

        Raises:
            BundleError: The bundle does not have the format.
        """
        artifacts = self.manifest.artifacts
        if format_name not in artifacts:
            expected = f"one of {', '.join(artifacts)}"
            hint = did_you_mean(format_name, artifacts)
            found = f"has no format {format_name!r}"
            raise BundleError(build_message(str(self.path), found, expected, hint))
        return self.path / artifacts[format_name].path


def open_bundle(path: Path) -> Bundle:
    """Check a bundle and return what its manifest says; nothing in it is loaded or executed.

    The digests find damage and careless changes. They are no signature: who can write the bundle
    can write its manifest too.

    Raises:
        BundleError: A file is missing, unknown, changed, or a link; the message names it.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is not there" if not root.exists() else "is not a folder"
        raise BundleError(build_message(str(root), found, "the folder of a bundle"))
    sizes = dict(_list_files(root))
    if FILE_NAME not in sizes:
        _refuse(FILE_NAME, "is missing", "a manifest in the bundle")
    if sizes[FILE_NAME] > _MAX_MANIFEST_BYTES:
        _refuse(FILE_NAME, f"has {sizes[FILE_NAME]} bytes", f"at most {_MAX_MANIFEST_BYTES}")
    manifest = parse_manifest((root / FILE_NAME).read_bytes())
    _check_files(root, manifest, sizes)
    return Bundle(root, manifest)


def _list_files(root: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield name and size in bytes of every file; refuse what is not a plain file or folder."""
    with os.scandir(root / prefix) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{prefix}{entry.name}"
            # DirEntry.stat leaves st_nlink at 0 on Windows.
            status = os.stat(root / name, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _list_files(root, f"{name}/")
            elif not stat.S_ISREG(status.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no plain file"
                _refuse(name, f"is {kind}", "a plain file")
            elif status.st_nlink > 1:
                found = f"has {status.st_nlink} hard links"
                action = "Copy the bundle with `cp -r`, which makes files of their own."
                raise BundleError(build_message(name, found, "one", action))
            else:
                yield name, status.st_size


def _check_files(root: Path, manifest: Manifest, sizes: dict[str, int]) -> None:
    listed = manifest.files
    for name in sizes:
        if name not in listed and name != FILE_NAME:
            action = "Remove it, or get the bundle again from where it was built."
            found = "is not in the manifest"
            raise BundleError(build_message(name, found, "only files the manifest lists", action))
    for name, entry in listed.items():
        if name not in sizes:
            _refuse(name, "is missing", "every file the manifest lists")
        if sizes[name] != entry.size_bytes:
            _refuse(name, f"has {sizes[name]} bytes", f"{entry.size_bytes}")
        if describe_file(root / name).sha256 != entry.sha256:
            _refuse(name, "was changed after it was written", f"sha256 {entry.sha256}")
    for format_name, artifact in manifest.artifacts.items():
        for name in (artifact.path, *artifact.files):
            if name not in listed:
                _refuse(FILE_NAME, f"format {format_name!r} names {name!r}", "a file it lists")


def _refuse(name: str, found: str, expected: str) -> NoReturn:
    action = "Get the bundle again from where it was built."
    raise BundleError(build_message(name, found, expected, action))
