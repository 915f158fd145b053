"""The examples of README.md and docs/ do what they say: `sh` lines that start with quantkit, and `python` blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from quantkit.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, code) of every fenced block of a language."""
    found = []
    for page in PAGES:
        for code in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M):
            found.append((page.name, code))
    return found


@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("sh")}))
def test_commands_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for name, code in blocks("sh"):
        for line in code.splitlines() if name == page else ():
            if line.startswith("quantkit "):
                assert main(shlex.split(line)[1:]) == 0, line


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "docs"})


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
