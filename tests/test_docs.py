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


def _work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with what the pages refer to."""
    for name in ("examples", "configs"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("sh")}))
def test_commands_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _work_in(tmp_path, monkeypatch)
    for name, code in blocks("sh"):
        for line in code.splitlines() if name == page else ():
            if line.startswith("quantkit "):
                assert main(shlex.split(line)[1:]) == 0, line


@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("python")}))
def test_python_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _work_in(tmp_path, monkeypatch)
    names: dict[str, object] = {"__name__": "docs"}
    for name, code in blocks("python"):
        if name == page:
            exec(compile(code, page, "exec"), names)


JOBS = [(page, code) for page, code in blocks("yaml") if "model_path: examples/" in code]


@pytest.mark.parametrize("page", sorted({page for page, _ in JOBS}))
def test_jobs_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML blocks that are whole jobs for a model that is here."""
    _work_in(tmp_path, monkeypatch)
    for number, code in enumerate(code for name, code in JOBS if name == page):
        Path(f"job{number}.yaml").write_text(code)
        assert main(["run", "-c", f"job{number}.yaml"]) == 0


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
