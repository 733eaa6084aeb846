"""Durations and times of runs in words."""

from __future__ import annotations

from datetime import datetime, timezone


def spell_duration(seconds: float | None) -> str | None:
    """Return 4.2 s, 3 min 5 s, 2 h 7 min or 3 d 4 h."""
    if seconds is None:
        return None
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def spell_time(seconds: float | None) -> str | None:
    """Return a time of the Unix clock as UTC, 2026-01-31 12:00; `None` for what is none."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return None
