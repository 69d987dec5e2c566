"""What the README and the examples print works: every block of code there says how it is checked, and is."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
EXAMPLES = sorted((REPO / "examples").glob("[0-9]*.py"))


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of the README, with the comment on the line before it."""

    line: int
    language: str
    marker: str
    text: str


def _blocks() -> list[Block]:
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    blocks = []
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        comment = re.fullmatch(r"<!-- (.+) -->", lines[start - 1])
        text = "\n".join(lines[start + 1 : end])
        blocks.append(Block(start + 1, lines[start][3:].strip(), comment[1] if comment else "", text))
    return blocks


BLOCKS = _blocks()
RUN = [block for block in BLOCKS if block.marker == "run"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root to the README's commands; blocks find what earlier ones made."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(REPO / "examples")
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line{block.line}")
def test_every_block_says_how_it_is_checked(block: Block) -> None:
    assert block.language in ("sh", "python", "text"), "name the language of the block"
    if block.language != "text":
        assert re.fullmatch(r"run|ci:(first|second)|not run: .{5,}", block.marker), "no marker on the line before it"


def test_ci_finds_the_two_commands() -> None:
    marked = [block.marker for block in BLOCKS if block.marker.startswith("ci:")]
    assert marked == ["ci:first", "ci:second"]
    script = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    assert "in_fresh_venv first\n" in script
    assert "in_fresh_venv second\n" in script


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"line{block.line}")
def test_block_runs(block: Block, workplace: Path, shipped_model: Path, need) -> None:
    if "ddsm export" in block.text:
        need("torch")
    if "--engine ray" in block.text:
        need("ray")
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = _run([*command, block.text], workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, tmp_path: Path, shipped_model: Path) -> None:
    done = _run([sys.executable, str(example)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_links_to_files_hold() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert targets
    for target in targets:
        assert target.startswith("http") or (REPO / target).exists(), target
