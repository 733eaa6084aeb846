"""Figures, texts, histograms and artifacts of a run: files beside the metric log."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dovetail.errors import ConfigError, build_message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MediaKind: TypeAlias = Literal["figure", "text", "histogram", "artifact"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,63}")
_HASHED = re.compile(r".*-[0-9a-f]{8}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def safe_name(name: str) -> str:
    """Return a file name for a metric's name: its own, or one that tells all others apart.

    Names of small letters, digits, "_", "." and "-" stay as they are. Any other gets a mark made
    from it, as file systems take upper for lower case, or refuse what a name may hold.
    """
    is_plain = _PLAIN.fullmatch(name) and not name.endswith(".")
    if is_plain and not _HASHED.fullmatch(name) and not _DEVICES.fullmatch(name):
        return name
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64].strip("_-") or "name"
    return f"{readable}-{mark}"


def write_media(
    run_dir: Path, name: str, step: int, suffix: str, write: Callable[[Path], object]
) -> str:
    """Write a file of one step whole, in place of an earlier one, and return its place in the run.

    Args:
        run_dir: The run's folder.
        name: Name of the figure, text or histogram.
        step: Optimizer step.
        suffix: Of the file, ".png" say.
        write: Writes the file it is given.
    """
    target = run_dir / "media" / safe_name(name) / f"step-{step:08d}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".partial-{target.name}")
    try:
        write(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target.relative_to(run_dir).as_posix()


def figure_writer(name: str, figure: Any) -> Callable[[Path], object]:
    """Return what writes a figure as a PNG file.

    Args:
        name: Its name, for messages.
        figure: A matplotlib figure, a Pillow image, or the path of a PNG file.

    Raises:
        ConfigError: It is something else, or the file is missing or no PNG.
    """
    where = f"log_figure {name!r}"
    if isinstance(figure, str | os.PathLike):
        path = Path(figure)
        try:
            with path.open("rb") as file:
                is_png = file.read(len(_PNG)) == _PNG
        except OSError as err:
            found = f"{str(path)!r} cannot be read: {err.strerror}"
            raise ConfigError(build_message(where, found, "a PNG file")) from err
        if not is_png:
            raise ConfigError(build_message(where, f"{str(path)!r} is no PNG file", "a PNG file"))
        return lambda target: shutil.copyfile(path, target)
    if hasattr(figure, "savefig"):
        return lambda target: figure.savefig(target, format="png")
    if hasattr(figure, "getbands"):  # none but images have these
        return lambda target: figure.save(target, format="PNG")
    expected = "a matplotlib figure, a Pillow image or the path of a PNG file"
    raise ConfigError(build_message(where, f"got a {type(figure).__name__}", expected))


def text_writer(name: str, text: Any) -> Callable[[Path], object]:
    """Return what writes a text as UTF-8.

    Raises:
        ConfigError: It is no string.
    """
    if not isinstance(text, str):
        found = f"got a {type(text).__name__}"
        raise ConfigError(build_message(f"log_text {name!r}", found, "a string"))
    return lambda target: target.write_bytes(text.encode("utf-8", "backslashreplace"))


def histogram_writer(name: str, values: Any, bins: Any) -> Callable[[Path], object]:
    """Return what writes a histogram over the finite values as JSON.

    Args:
        name: Its name, for messages.
        values: Numbers, an array or a tensor of any shape.
        bins: Number of bins, of the same width.

    Raises:
        ConfigError: The values are no numbers, or the bins no whole number from 1 on.
    """
    where = f"log_histogram {name!r}"
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ConfigError(build_message(where, f"bins is {bins!r}", "an integer >= 1"))
    counts, edges, num_left_out = count_values(_as_array(values, where), bins)
    record = {"counts": counts, "edges": edges, "num_non_finite": num_left_out}
    return lambda target: target.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")


def _as_array(values: Any, where: str) -> npt.NDArray[np.float64]:
    import numpy as np

    if hasattr(values, "detach"):  # a tensor; NumPy knows no bfloat16
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"they are {array.dtype}")
        return array.astype(np.float64).ravel()
    except (TypeError, ValueError) as err:
        found = f"got a {type(values).__name__}: {err}"
        raise ConfigError(build_message(where, found, "real numbers")) from err


def count_values(
    values: npt.NDArray[np.float64], bins: int
) -> tuple[list[float], list[float], int]:
    """Return counts, edges, and the number of values that are not finite and left out.

    Args:
        values: Shape `(n,)`.
        bins: Number of bins between the smallest and the largest finite value.
    """
    import numpy as np

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:  # as numpy.histogram shows a single value
        low, high = low - 0.5, high + 0.5
    # A range of a few representable numbers has no room for the edges. Halves all along, so that a
    # range over all that floats can hold has a width.
    least = max(8 * bins * float(np.spacing(max(abs(low), abs(high)) / 2)), 1e-300)
    if high / 2 - low / 2 < least:
        largest = float(np.finfo(float).max)
        low, high = max(low - least, -largest), min(high + least, largest)
    edges = np.linspace(low / 2, high / 2, bins + 1) * 2
    # Rounding must not push the outermost values out.
    edges[0], edges[-1] = min(low, edges[0]), max(high, edges[-1])
    counts, _ = np.histogram(finite, bins=edges)
    return counts.astype(float).tolist(), edges.tolist(), int(values.size - finite.size)


def keep_artifact(run_dir: Path, name: str, step: int, path: Any) -> str:
    """Return the place in the run of a file or folder; one from outside is copied into it.

    Args:
        run_dir: The run's folder.
        name: The artifact's name.
        step: Optimizer step; a copy of each step is kept.
        path: What to keep.

    Raises:
        ConfigError: There is nothing, or it holds the run's folder.
    """
    where = f"log_artifact {name!r}"
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(build_message(where, f"got a {type(path).__name__}", "a path"))
    source, home = Path(path).resolve(), run_dir.resolve()
    if not source.exists():
        found = f"{str(source)!r} does not exist"
        raise ConfigError(build_message(where, found, "a file or a folder"))
    if home.is_relative_to(source):
        found = f"{str(source)!r} holds the run's own folder"
        raise ConfigError(build_message(where, found, "a file or folder in the run or beside it"))
    if source.is_relative_to(home):
        return source.relative_to(home).as_posix()
    folder = home / "artifacts" / safe_name(name) / f"step-{step:08d}"
    target, aside = folder / source.name, folder / f".partial-{source.name}"
    try:
        # Nothing stays of what a repeated step kept before.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, aside)
        else:
            shutil.copyfile(source, aside)
        aside.replace(target)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target.relative_to(home).as_posix()
