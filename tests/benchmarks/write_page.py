"""Runs every benchmark of this folder and writes docs/reference/benchmarks.md from what they print.

Run it on a quiet machine: `tox -e bench`, or `python tests/benchmarks/write_page.py [NAME …]` for
some of them. The sections of the others stay as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reference" / "benchmarks.md"
_HEAD = """# Measured

<!-- Written by `tox -e bench`; do not edit. -->

Each table is what one script of `tests/benchmarks` printed under `tox -e bench`: CPU time,
the candidates in turn, medians with their spread, and a control that measures one thing against
itself. Absolute times are this machine's; the ratios are what carries over.
"""


def read_sections() -> dict[str, str]:
    """Return the page's sections by the script that wrote them."""
    if not PAGE.exists():
        return {}
    parts = re.split(r"^## `(.+)`\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def main(wanted: list[str]) -> int:
    """Run the benchmarks named, or all, and write the page."""
    sections = read_sections()
    for script in sorted(FOLDER.glob("bench_*.py")):
        if wanted and script.stem not in wanted:
            continue
        print(f"== {script.name}", flush=True)
        ended = subprocess.run(
            [sys.executable, script], stdout=subprocess.PIPE, text=True, check=False
        )
        print(ended.stdout)
        if ended.returncode:
            return ended.returncode
        sections[script.name] = ended.stdout.strip()
    body = "\n\n".join(f"## `{name}`\n\n{text}" for name, text in sorted(sections.items()))
    PAGE.write_text(f"{_HEAD}\n{body}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
