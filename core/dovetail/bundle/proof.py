"""The proof: an artifact runs in its own runtime, in a fresh process, and must agree.

`python -m dovetail.bundle.proof` is the fresh process: it reads a request as JSON from stdin and
answers with JSON on stdout. Nothing here imports torch, so that a runtime without torch is
proven without torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.bundle.golden import FILE_NAME as GOLDEN
from dovetail.bundle.golden import GoldenCase, read_golden
from dovetail.bundle.parity import LIMITS, ParityError, measure_error
from dovetail.bundle.reader import Bundle, open_bundle
from dovetail.errors import BundleError, build_message, did_you_mean

if TYPE_CHECKING:
    from dovetail.types import Exporter, Runner

TIMEOUT_S = 1800.0
"""Seconds after which a runtime that does not answer has failed its proof."""


@dataclass(frozen=True)
class ProofRequest:
    """What the fresh process needs to know."""

    format: str
    """Name of the exporter, as a config names it."""
    task: Mapping[str, Any]
    options: Mapping[str, Any]
    artifact: Path
    golden: Path


@dataclass(frozen=True)
class Proof:
    """What the fresh process measured."""

    errors: tuple[float, ...] = ()
    """Error of each golden case, relative to the largest output."""
    problem: str | None = None
    """Why the artifact is not proven; `None` if it is."""


@dataclass(frozen=True)
class FormatVerification:
    """One format of a bundle, run again."""

    format: str
    max_error: float | None
    """Largest error over all golden cases; `None` where it could not be measured."""
    limit: float
    batch_sizes: tuple[int, ...]
    seconds: float
    problem: str | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the format computes what the trained model computes."""
        return self.problem is None


@dataclass(frozen=True)
class VerificationReport:
    """A bundle whose files are intact, and what its formats computed."""

    path: Path
    formats: tuple[FormatVerification, ...] = field(default=())

    @property
    def is_ok(self) -> bool:
        """Whether every format that was run agrees."""
        return all(f.is_ok for f in self.formats)


def verify_bundle(path: Path, formats: Sequence[str] | None = None) -> VerificationReport:
    """Open a bundle safely and run its artifacts against the golden outputs.

    A format that carries code executes it here, in its own process: verify bundles only from
    where you would install a package from.

    Args:
        path: The bundle.
        formats: Which formats to run; all of them by default.

    Raises:
        BundleError: A file is missing, unknown or changed, or there is no such format.
    """
    bundle = open_bundle(path)
    known = list(bundle.manifest.artifacts)
    for name in formats or ():
        if name not in known:
            expected = f"some of {', '.join(known)}"
            found = f"has no format {name!r}"
            raise BundleError(build_message(str(path), found, expected, did_you_mean(name, known)))
    return VerificationReport(
        bundle.path, tuple(_verify_format(bundle, n) for n in known if not formats or n in formats)
    )


def _verify_format(bundle: Bundle, name: str) -> FormatVerification:
    manifest = bundle.manifest
    entry, limit = manifest.artifacts[name], LIMITS[manifest.precision]
    start = time.perf_counter()
    request = ProofRequest(
        name,
        manifest.task.to_dict(),
        entry.options,
        bundle.artifact_path(name),
        bundle.path / GOLDEN,
    )
    labels = [describe_sizes(case.sizes) for case in entry.cases]
    proof = prove_artifact(request, limit, labels)
    return FormatVerification(
        format=name,
        max_error=max(proof.errors, default=None),
        limit=limit,
        batch_sizes=tuple(c.sizes["batch"] for c in entry.cases if "batch" in c.sizes),
        seconds=time.perf_counter() - start,
        problem=proof.problem,
    )


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return `batch 3, sequence 17`."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the only shape"


def prove_artifact(
    request: ProofRequest, limit: float, labels: Sequence[str], timeout_s: float = TIMEOUT_S
) -> Proof:
    """Run an artifact in a fresh process and judge what it computed.

    Args:
        request: What to run.
        limit: Largest error, relative to the largest output.
        labels: What each golden case is called in messages, in order.
        timeout_s: Seconds the process may take.
    """
    answer = _ask_fresh_process(request, timeout_s)
    if answer.get("problem"):
        return Proof(problem=answer["problem"])
    results = answer["cases"]
    if len(results) != len(labels) or not results:
        return Proof(problem=f"there are {len(results)} golden cases instead of {len(labels)}")
    problems = [
        f"at {label}: {text}"
        for label, result in zip(labels, results, strict=True)
        if (text := result["problem"] or _judge(result["error"], limit))
    ]
    errors = tuple(r["error"] for r in results if r["error"] is not None)
    more = f" (and {len(problems) - 1} more cases)" if len(problems) > 1 else ""
    return Proof(errors, problems[0] + more if problems else None)


def _judge(error: float, limit: float) -> str:
    if error <= limit:
        return ""
    return f"differs from the trained model by {error:.2g} of the largest output; limit {limit:.0e}"


def _ask_fresh_process(request: ProofRequest, timeout_s: float) -> dict[str, Any]:
    question = {
        "format": request.format,
        "task": request.task,
        "options": request.options,
        "artifact": str(request.artifact.resolve()),
        "golden": str(request.golden.resolve()),
    }
    # Python puts the working folder on the import path: an empty one holds no surprises.
    with tempfile.TemporaryDirectory(prefix="dovetail-proof-") as empty:
        try:
            # -B: a __pycache__ would be an unknown file in the bundle.
            ended = subprocess.run(
                [sys.executable, "-B", "-m", "dovetail.bundle.proof"],
                input=json.dumps(question).encode(),
                capture_output=True,
                cwd=empty,
                env=_environment(),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"its runtime did not answer within {timeout_s:.0f} s"}
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        return {"problem": f"its runtime ended with status {ended.returncode} ({lines[-1]})"}
    return answer


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    if paths := environment.get("PYTHONPATH"):
        absolute = (os.path.abspath(p) for p in paths.split(os.pathsep) if p)
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
    return environment


def load_exporter(name: str, task: Mapping[str, Any], options: Mapping[str, Any]) -> Exporter:
    """Make the exporter of a format in a process that knows nothing but installed plugins.

    Raises:
        DovetailError: It is not installed here, or does not take the options.
    """
    from dovetail.registry import default_registry
    from dovetail.task import TaskSpec

    registry = default_registry()
    made = registry.build_options("export", name, options)
    return registry.export(name, TaskSpec.from_dict(task), made)


def _run_cases(question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        exporter = load_exporter(question["format"], question["task"], question["options"])
        cases = read_golden(Path(question["golden"]))
        runner = exporter.load(Path(question["artifact"]))
    except Exception as err:
        return {"problem": f"does not load: {_describe(err)}"}
    return {"problem": None, "cases": [_run_case(runner, case) for case in cases]}


def _run_case(runner: Runner, case: GoldenCase) -> dict[str, Any]:
    try:
        return {"error": measure_error(case.outputs, runner(case.inputs)), "problem": None}
    except ParityError as err:
        return {"error": None, "problem": str(err)}
    except Exception as err:
        return {"error": None, "problem": f"does not run: {_describe(err)}"}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Answer one request; what a runtime prints goes to stderr, so that stdout is JSON alone."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as reply:
        os.dup2(2, 1)
        json.dump(_run_cases(json.load(sys.stdin)), reply)


if __name__ == "__main__":
    main()
