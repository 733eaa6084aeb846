"""The golden cases: inputs with the trained model's outputs, as arrays in one file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dovetail.errors import BundleError, build_message

if TYPE_CHECKING:
    from dovetail.types import Array

    Arrays: TypeAlias = Mapping[str, Array]

FILE_NAME = "golden.npz"


@dataclass(frozen=True)
class GoldenCase:
    """One batch and what the trained model says to it."""

    inputs: Arrays
    outputs: Arrays


def write_golden(path: Path, cases: Sequence[GoldenCase]) -> None:
    """Write cases as `case<i>/inputs/<name>` and `case<i>/outputs/<name>`.

    Equal cases make equal bytes: every member of the archive has the same date.
    """
    arrays: dict[str, Array] = {}
    for index, case in enumerate(cases):
        arrays |= {f"case{index}/inputs/{n}": a for n, a in case.inputs.items()}
        arrays |= {f"case{index}/outputs/{n}": a for n, a in case.outputs.items()}
    # Not `np.savez`: NumPy 1 cannot tell it to refuse what it would pickle.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_golden(path: Path) -> tuple[GoldenCase, ...]:
    """Read what `write_golden` wrote; nothing in the file is executed.

    Raises:
        BundleError: The file cannot be read, or has other members.
    """
    inputs: dict[int, dict[str, Array]] = {}
    outputs: dict[int, dict[str, Array]] = {}
    try:
        # A file of our own: on a torn archive NumPy would leave the one it opened behind.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            for key in archive.files:
                case, role, name = key.split("/", 2)
                index = int(case.removeprefix("case"))
                {"inputs": inputs, "outputs": outputs}[role].setdefault(index, {})[name] = archive[
                    key
                ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        found = f"cannot be read ({type(err).__name__}: {err})"
        expected = "arrays named case<i>/inputs/<name> and case<i>/outputs/<name>"
        action = "Get the bundle again from where it was built."
        raise BundleError(build_message(path.name, found, expected, action)) from err
    return tuple(GoldenCase(inputs[i], outputs.get(i, {})) for i in sorted(inputs))
