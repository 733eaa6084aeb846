"""The manifest of a bundle: every file's digest, the signature, and the measured parity."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dovetail.bundle.parity import Precision
from dovetail.errors import BundleError, build_message
from dovetail.task import TaskSpec, TensorSpec

SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "manifest.json"
_DIGEST: Final = "digest"
_GET_AGAIN: Final = "Get the bundle again from where it was built."


def _check_name(name: str) -> str:
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") for part in parts)
    if not is_plain or any(char in name for char in "\\:\0") or name == FILE_NAME:
        raise ValueError(f"{name!r} is not the name of a file inside the bundle")
    return name


def _check_finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


FileName = Annotated[str, AfterValidator(_check_name)]
Measured = Annotated[float, Field(ge=0), AfterValidator(_check_finite)]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Closed):
    """One file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: NonNegativeInt


class CaseEntry(_Closed):
    """One golden case as it was proven."""

    sizes: dict[str, int]
    """Size of each dimension that varies: batch, sequence."""
    max_error: Measured
    """Largest error relative to the largest output."""


class ArtifactEntry(_Closed):
    """One format."""

    path: FileName
    """The file a runtime opens."""
    files: tuple[FileName, ...]
    metadata: dict[str, Any]
    options: dict[str, Any]
    """Options its exporter was made with."""
    requirements: tuple[str, ...]
    carries_code: bool
    """Whether opening it can execute code that lies in it."""
    export_seconds: Measured
    limit: Measured
    """Largest error it may show."""
    cases: tuple[CaseEntry, ...]


class FailureEntry(_Closed):
    """One format that was asked for and is not there."""

    format: str
    stage: Literal["export", "proof"]
    reason: str
    remedy: str


class Manifest(_Closed):
    """What a bundle holds and what was measured."""

    schema_version: Literal[1] = SCHEMA_VERSION
    task: TaskSpec
    created: str
    """UTC, ISO 8601."""
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    versions: dict[str, str]
    artifacts: dict[str, ArtifactEntry]
    failures: tuple[FailureEntry, ...] = ()
    files: dict[FileName, FileEntry] = Field(default_factory=dict)
    """Every file of the bundle except the manifest itself."""


def render_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's file; it carries a digest of itself."""
    fields = manifest.model_dump(mode="json")
    return _to_bytes({_DIGEST: _digest(fields), **fields})


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest's file.

    Raises:
        BundleError: It is not what `render_manifest` wrote, down to the last byte.
    """
    try:
        fields = json.loads(data.decode("utf-8"))
    except ValueError as err:
        _refuse(f"is not JSON ({err})", "the manifest as it was written", err)
    if not isinstance(fields, dict):
        _refuse(f"holds a {type(fields).__name__}", "a JSON object")
    version = fields.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        found = f"has schema version {version}"
        action = "Install a newer dovetail."
        raise BundleError(build_message(FILE_NAME, found, f"at most {SCHEMA_VERSION}", action))
    digest = fields.pop(_DIGEST, None)
    if digest != _digest(fields) or _to_bytes({_DIGEST: digest, **fields}) != data:
        _refuse("was changed after it was written", "contents that fit its digest")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as err:
        problem = err.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        _refuse(f"{where}: {problem['msg']}", f"schema version {SCHEMA_VERSION}", err)


def describe_file(path: Path) -> FileEntry:
    """Return size and digest of a file."""
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _to_bytes(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode("ascii")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_to_bytes(fields)).hexdigest()


def _refuse(found: str, expected: str, cause: Exception | None = None) -> NoReturn:
    raise BundleError(build_message(FILE_NAME, found, expected, _GET_AGAIN)) from cause
