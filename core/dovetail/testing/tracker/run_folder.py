"""A run's folder as a tracker finds it, and what it must leave alone there."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dovetail.run.tracking import LOG_NAME

RUN_FILES: Mapping[str, bytes] = {
    "config.toml": b'[run]\nname = "conformance"\n',
    "plugins.lock.json": b"[]\n",
    "report.html": b"<!doctype html>\n",
    "checkpoints/step-000001/model.safetensors": bytes(range(256)),
}
"""Files of others in a run's folder."""


def write_run_files(directory: Path, root: Path | None = None) -> dict[str, str]:
    """Write the files of others; return the digest of each file under `root`."""
    for name, data in RUN_FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return digests(root or directory)


def digests(root: Path) -> dict[str, str]:
    """Return the digest of each file under a folder, by its path in it."""
    found = {}
    for path in _files(root):
        with suppress(FileNotFoundError):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(root).as_posix()] = digest
    return found


def _files(root: Path) -> list[Path]:
    """Return the files under a folder; a backend's own process may be tidying up there."""
    return sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)


def find_strays(root: Path, directory: Path, before: Mapping[str, str]) -> list[str]:
    """Return what was changed, or made outside of one new folder in the run's folder.

    Args:
        root: A folder around the run's folder.
        directory: The run's folder, with its metric log, its locks and the tracker's cursor.
        before: Digests of the files under `root` before the tracker came.
    """
    after = digests(root)
    strays = [name for name, digest in before.items() if after.get(name) != digest]
    inside = f"{directory.relative_to(root).as_posix()}/"
    own: set[str] = set()
    for name in sorted(set(after) - set(before)):
        folder, is_nested, _ = name.removeprefix(inside).partition("/")
        if name.startswith(inside) and (is_nested or _is_log(directory / folder)):
            own |= {folder} if is_nested else set()
        else:
            strays.append(name)
    taken = {name.removeprefix(inside).partition("/")[0] for name in before}
    return strays + sorted(f"{name}/" for name in own & taken) + sorted(own - taken)[1:]


def count_bytes(directory: Path) -> int:
    """Return the size of all files in a run's folder but the log and what goes with it."""
    size_bytes = 0
    for path in _files(directory):
        with suppress(FileNotFoundError):
            if not path.is_symlink() and not _is_log(path):
                size_bytes += path.stat().st_size
    return size_bytes


def _is_log(path: Path) -> bool:
    """Return whether a file is the log, a cursor in it or a lock of it."""
    return path.name == LOG_NAME or path.suffix in (".cursor", ".lock")


def draw_noise(size: int) -> bytes:
    """Return a grey PNG picture of `size` pixels a side that cannot be compressed."""
    noise = hashlib.shake_256(b"noise").digest(size * size)
    rows = b"".join(b"\0" + noise[i * size : (i + 1) * size] for i in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data
