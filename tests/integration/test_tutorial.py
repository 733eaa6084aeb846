"""The tutorial "your first plugin", executed: each command, each edit, each output it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "first-plugin.md"
BLOCK = re.compile(
    r"(?:^`(?P<path>[\w./]+)`\n\n|^<!-- (?P<mark>[\w ]+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```",
    flags=re.DOTALL | re.MULTILINE,
)
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]


@dataclass
class Reader:
    """Does what the page says, in a folder and with an interpreter of its own."""

    python: Path
    folder: Path
    output: str = ""
    file: Path = field(default_factory=Path)
    num_done: int = 0

    def follow(self, path: str | None, mark: str | None, language: str, text: str) -> None:
        if mark == "not run":
            return
        if path is not None:
            self.file = self.folder / path
        if language == "console":
            self.output = "".join(self.run(line, fails=mark == "fails") for line in commands(text))
        elif language == "text":
            lost = [line for line in text.splitlines() if line not in self.output]
            assert not lost, f"{lost} is not in\n{self.output}"
        elif language == "diff":
            self.edit(text)
        elif path is not None:
            self.file.write_text(text, encoding="utf-8")
        else:
            assert any(text in p.read_text() for p in self.folder.glob("*.toml")), text
        self.num_done += 1

    def edit(self, text: str) -> None:
        lines = text.splitlines()
        old, new = ("\n".join(x[1:] for x in lines if x[:1] in ("", " ", s)) for s in "-+")
        source = self.file.read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} is not once in {self.file}"
        self.file.write_text(source.replace(old, new), encoding="utf-8")

    def run(self, line: str, *, fails: bool) -> str:
        command, *arguments = shlex.split(line)
        if command == "cd":
            self.folder /= arguments[0]
            return ""
        if command == "pip":
            # What it would fetch is there already, in the environment that this one looks into.
            arguments = (
                arguments[: arguments.index("--group")] if "--group" in arguments else arguments
            )
            arguments = [arguments[0], *OFFLINE, *(a for a in arguments[1:] if a not in OFFLINE)]
        done = subprocess.run(
            [str(self.python), "-m", command, *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def commands(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip():
            yield line.split("   #")[0]


@pytest.mark.slow
def test_first_plugin_is_written_as_the_tutorial_says(
    plugin_environment: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    reader = Reader(plugin_environment(), folder)
    found = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))
    for block in found:
        reader.follow(block["path"], block["mark"], block["language"], block["text"])
    assert reader.num_done == len(found) - 1
    assert (reader.folder / "dist" / "dovetail_scaled-0.1.0-py3-none-any.whl").is_file()
    (lock,) = reader.folder.glob("runs/toy/*/plugins.lock.json")
    assert "dovetail-scaled" in lock.read_text()
