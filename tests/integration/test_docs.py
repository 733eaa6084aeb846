"""What the documentation says is what the code does."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dovetail import hookspecs
from dovetail._markers import HOOKS, hook_function

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def build_reference() -> ModuleType:
    path = ROOT / "docs" / "build_reference.py"
    spec = importlib.util.spec_from_file_location("build_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["hooks.md", "config.md"])
def test_reference_is_as_the_code_says(build_reference: ModuleType, page: str) -> None:
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == build_reference.PAGES[page](), "run: python docs/build_reference.py"


def test_command_line_page_says_what_the_commands_say(build_reference: ModuleType) -> None:
    # Releases of click differ in layout, so the words count.
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    words = [re.findall(r"[\w-]+", text) for text in (page, build_reference.PAGES["cli.md"]())]
    assert sorted(words[0]) == sorted(words[1]), "run: python docs/build_reference.py"


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_answers_the_six_questions(hook: str) -> None:
    doc = inspect.getdoc(getattr(hookspecs, hook_function(hook))) or ""  # type: ignore[arg-type]
    questions = ("When", "How often", "Answers", "Order", "Without an implementation", "Ownership")
    assert [q for q in questions if f"- **{q}:**" not in doc] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    local = [t for t in targets if "://" not in t]
    assert [t for t in local if not (page.parent / t).exists()] == []


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_plugin_works(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(_blocks(ROOT / "README.md", "python")[1])
    script = (
        "import my_module, torch, dovetail\n"
        "from dovetail import registry\n"
        "registry.register(my_module, hook='collate', name='scaled')\n"
        "data = [{'features': torch.ones(3) * i, 'labels': i % 2} for i in range(8)]\n"
        "config = {'collate': {'use': 'scaled', 'scaled': {'scale': 2.0}}}\n"
        "result = dovetail.train(config, model=torch.nn.Linear(3, 2), data=data)\n"
        "print(result.status)\n"
    )
    assert _run(script, tmp_path) == "completed"


def test_readme_parts_work_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    printed = _run(_blocks(ROOT / "README.md", "python")[2], tmp_path)
    # Twenty images in fives of four: one full window, and a tail of one micro-batch.
    assert printed.startswith("2 optimizer steps from 5 micro-batches (0 in the open window)")


def _run(source: str, folder: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", source],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
