"""What the documents name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from click import Context

from dovetail import cli
from dovetail.techniques import MODULES, technique
from tests.tiny import NEEDED

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Every `dovetail ...` line, as words."""
    lines = re.findall(rf"\bdovetail ((?:{'|'.join(cli.COMMANDS)})\b[^`\n#]*)", text)
    return [shlex.split(line.replace("...", "")) for line in lines]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_documented_commands_and_options_exist(path: Path) -> None:
    group = typer.main.get_command(cli.build())
    for name, *words in commands(path.read_text()):
        command = group.get_command(Context(group), name)  # type: ignore[attr-defined]
        if hasattr(command, "get_command"):  # a group
            name, *words = words
            command = command.get_command(Context(group), name)
        assert command is not None, name
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        unknown = [w for w in words if w.startswith("-") and w != "-" and w not in known]
        assert not unknown, (name, unknown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_documented_files_exist(path: Path) -> None:
    text = path.read_text()
    named = re.findall(r"\]\(([^)#:]+)\)", text)
    named += re.findall(r"\b((?:dovetail|tests|bench|docs|examples|scripts)/[\w/]+\.(?:py|md|sh))\b", text)
    missing = [n for n in named if not (ROOT / n).exists() and not (path.parent / n).exists()]
    assert not missing


def test_the_readme_shows_the_main_commands() -> None:
    names = {words[0] for words in commands(DOCUMENTS[0].read_text())}
    assert {"run", "chat", "serve", "batch", "export", "doctor"} <= names


def test_the_technique_table_is_complete_and_true() -> None:
    rows = re.findall(r"^\| `([\w-]+:[^`]*)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [technique(row).spec for row in rows] == [technique(NEEDED.get(n, n)).spec for n in sorted(MODULES)]


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        used = set(re.findall(r"^\$? ?make ([a-z]+)\b|`make ([a-z]+)`", path.read_text(), re.MULTILINE))
        assert {a or b for a, b in used} <= targets, path
