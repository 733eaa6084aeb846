"""What happens between a trained model and a server: build, prove, open, verify a bundle.

Names are resolved when they are first used, so that opening and verifying import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.bundle.build import build_bundle
    from dovetail.bundle.manifest import Manifest
    from dovetail.bundle.proof import FormatVerification, VerificationReport, verify_bundle
    from dovetail.bundle.reader import Bundle, open_bundle
    from dovetail.bundle.report import ArtifactReport, BundleReport, FormatFailure
    from dovetail.bundle.served import ServedModel

_HOME = {
    "ArtifactReport": "report",
    "Bundle": "reader",
    "BundleReport": "report",
    "FormatFailure": "report",
    "FormatVerification": "proof",
    "Manifest": "manifest",
    "ServedModel": "served",
    "VerificationReport": "proof",
    "build_bundle": "build",
    "open_bundle": "reader",
    "verify_bundle": "proof",
}
"""Module that holds each public name."""

__all__ = [
    "ArtifactReport",
    "Bundle",
    "BundleReport",
    "FormatFailure",
    "FormatVerification",
    "Manifest",
    "ServedModel",
    "VerificationReport",
    "build_bundle",
    "open_bundle",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
