"""`dovetail plugins doctor`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from dovetail.cli._console import format_columns, say, wrap_text
from dovetail.cli._errors import FAILED, debug_option
from dovetail.cli._options import admission_options, flagged_admission, json_option
from dovetail.cli._state import probe, probed_state, read_state
from dovetail.registry.admission import Admission
from dovetail.registry.checkup import Finding, Kind, check_installs, check_names
from dovetail.registry.listing import PluginInfo, list_entry_points
from dovetail.registry.probe import TIMEOUT_S, Probed

SLOW_MS = 200.0
"""Milliseconds from which on an import is called slow."""

_WIDTH = 80
_HEADER = ("HOOK", "NAME", "DISTRIBUTION", "VERSION", "MS", "STATE")
_KINDS: dict[Kind, str] = {"broken": "broken", "slow": "slow", "note": "to note"}
"""What is found, the gravest first, and how the last line counts it."""


@click.command()
@click.option("--verbose", "-v", is_flag=True, help="Show how long every import took.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT_S,
    metavar="SECONDS",
    help=f"Give up on an import after this long; {TIMEOUT_S:g} without it.",
)
@json_option
@admission_options
@debug_option
def doctor(verbose: bool, timeout_s: float, as_json: bool) -> None:
    """Look for what is wrong with the plugins.

    Looked for are: installations that left rubbish behind; packages that are missing; names that
    two distributions offer; modules that hide each other; plugins that do not keep the contract of
    their hook, or use what is deprecated in it; imports that take longer than 200 ms beside torch
    and dovetail; plugins that are kept out. Each plugin is imported in a process of its own.

    The exit status is 1 if anything is broken.
    """
    everyone = list_entry_points()
    admission = flagged_admission()
    admission.check(everyone)
    admitted = [info for info in everyone if admission.admits(info)]
    probed = probe(admitted, timeout_s)
    findings = _find(probed)
    kept_out = [info for info in everyone if info not in probed]
    findings += _tell_kept_out(kept_out, admission)
    findings.sort(key=lambda finding: list(_KINDS).index(finding.kind))
    if as_json:
        say(json.dumps(_as_json(probed, findings), indent=2))
    else:
        _print(probed, findings, verbose=verbose)
    if any(finding.kind == "broken" for finding in findings):
        raise click.exceptions.Exit(FAILED)


def _find(probed: Mapping[PluginInfo, Probed]) -> list[Finding]:
    """Return what metadata and imports tell, each fault once."""
    installs, needs = [*check_installs()], [*_check_requirements([*probed])]
    gone = frozenset[str]().union(*(finding.explains for finding in installs))
    poor = frozenset[str]().union(*(finding.explains for finding in needs))
    findings = [*installs, *needs, *check_names([*probed])]
    for info, result in probed.items():
        if not (info.value in gone or (info.value in poor and result.outcome == "needs")):
            findings += _check_probed(info, result)
    return findings


def _check_requirements(plugins: Sequence[PluginInfo]) -> Iterator[Finding]:
    """Yield what is declared and not installed, and names that nobody can choose."""
    told: set[str] = set()
    for info in plugins:
        state = read_state(info)
        if state.reason:
            hint = "Its author must give it another."
            yield Finding("broken", f"{state.reason}.", hint)
        if not state.missing or state.install is None or state.install in told:
            continue
        told.add(state.install)
        missing = " and ".join(state.missing)
        are = "are" if len(state.missing) > 1 else "is"
        is_extra = state.text.startswith("may")
        what = info.where if is_extra else f"distribution {info.distribution!r}"
        need = "its extra names" if is_extra else "needs"
        text = f"{what}: {need} {missing}, which {are} not installed."
        same = (p.value for p in plugins if p.distribution == info.distribution)
        explains = frozenset([info.value] if is_extra else same)
        yield Finding("note" if is_extra else "broken", text, state.install, explains)


def _check_probed(info: PluginInfo, probed: Probed) -> Iterator[Finding]:
    if probed.reason:
        yield Finding("broken", probed.reason)
    for text in probed.deprecations:
        hint = f"pip install --upgrade {info.distribution}, or tell its author."
        yield Finding("note", f"{info.where}: {text}", hint)
    if probed.outcome == "loads" and probed.duration_ms > SLOW_MS:
        text = f"{info.where}: takes {probed.duration_ms:.0f} ms to import beside torch."
        hint = "Its author should import what is heavy in the function that needs it."
        yield Finding("slow", text, hint)


def _tell_kept_out(plugins: Sequence[PluginInfo], admission: Admission) -> Iterator[Finding]:
    names: dict[str, list[str]] = {}
    for info in plugins:
        names.setdefault(info.distribution, []).append(f"{info.role} {info.name}")
    for distribution, offers in names.items():
        text = f"distribution {distribution!r}: is kept out ({', '.join(offers)})."
        yield Finding("note", text, f"To let it in, change the {admission.reason()}.")


def _print(
    probed: Mapping[PluginInfo, Probed], findings: Sequence[Finding], *, verbose: bool
) -> None:
    if verbose and probed:
        for line in format_columns([_row(*item) for item in probed.items()], _HEADER):
            say(line)
        say()
    for finding in findings:
        text = f"{finding.kind}: {' '.join(finding.text.split())}"
        for line in wrap_text(text, _WIDTH):
            say(line)
        if finding.remedy:
            say(f"  -> {finding.remedy}")
        say()
    num_owners = len({info.distribution for info in probed})
    counts = Counter(finding.kind for finding in findings)
    told = [f"{counts[kind]} {word}" for kind, word in _KINDS.items() if counts[kind]]
    say(
        f"{_count(len(probed), 'plugin')} of {_count(num_owners, 'distribution')}: "
        f"{', '.join(told) or 'all is well'}"
    )


def _row(info: PluginInfo, probed: Probed) -> tuple[str, ...]:
    time = f"{probed.duration_ms:.0f}" if probed.duration_ms else "-"
    state = probed_state(probed).text
    return info.role, info.name, info.distribution, info.version, time, state


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _as_json(probed: Mapping[PluginInfo, Probed], findings: Sequence[Finding]) -> dict[str, Any]:
    plugins = [
        {"hook": p.role, "name": p.name, "distribution": p.distribution, **asdict(result)}
        for p, result in probed.items()
    ]
    told = [{"kind": f.kind, "text": f.text, "remedy": f.remedy} for f in findings]
    return {"plugins": plugins, "findings": told}
