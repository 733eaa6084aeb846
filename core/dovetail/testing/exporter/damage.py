"""Artifacts that somebody damaged, or put something into."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.bundle.golden import Arrays
    from dovetail.types import Exporter


class _Payload:
    """Unpickles by writing a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_bytes, (self._marker, b""))


def list_plants(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what writes `marker` when somebody executes it."""
    pickled = pickle.dumps(_Payload(marker), protocol=2)
    yield "a pickle", pickled
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # as torch.save writes it
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    yield "a pickle of torch", archive.getvalue()
    array = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    yield "a pickle of NumPy", array + header + pickled
    yield "a Python source", f"open({str(marker)!r}, 'w').close()\n".encode()


def run_or_none(exporter: Exporter, path: Path, inputs: Arrays) -> Arrays | None:
    """Load and run an artifact; `None` if that is refused, whatever the refusal is called."""
    with warnings.catch_warnings():
        # A library that refuses a file may leave it open, as NumPy does with a torn archive.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return exporter.load(path)({name: array.copy() for name, array in inputs.items()})
        except (Exception, SystemExit):
            return None
