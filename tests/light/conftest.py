"""An environment with what `pip install dovetail-llm` brings, pip, and nothing else: no torch, no test tools."""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def closure(*names: str) -> dict[str, metadata.Distribution]:
    """The named distributions and all that they require here, by name. Extras count where they are asked for."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    open_ = [Requirement(name) for name in names]
    while open_:
        requirement = open_.pop()
        for wanted in ("", *requirement.extras):
            name = requirement.name.lower().replace("_", "-")
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            found[name] = metadata.distribution(name)
            open_ += [
                inner
                for inner in map(Requirement, found[name].requires or [])
                if inner.marker is None or inner.marker.evaluate({"extra": wanted})
            ]
    return found


def dependencies() -> dict[str, metadata.Distribution]:
    """What users get with the package."""
    return closure(*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def package_files(distribution: metadata.Distribution) -> Iterator[tuple[Path, Path]]:
    """Where its files are, and their places below site-packages. No scripts, and no editable install's finder."""
    for file in distribution.files or []:
        if ".." not in file.parts and "__pycache__" not in file.parts and file.suffix != ".pth":
            yield Path(str(distribution.locate_file(file))), Path(*file.parts)


@dataclass(frozen=True)
class Light:
    """The environment's Python, and the folder of the user's data."""

    python: Path
    home: Path

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return {
            **kept,
            "PATH": str(self.python.parent),
            "DOVETAIL_HOME": str(self.home),
            "PYTHONWARNINGS": "error::UserWarning",
        }

    def run(self, *arguments: object, stdin: str = "", seconds: float = 110) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *map(str, arguments)], env=self.environment(), input=stdin, capture_output=True,
            text=True, timeout=seconds, cwd=self.home,
        )  # fmt: skip

    def dovetail(self, *arguments: object, **how: Any) -> str:
        """What the command prints; it must succeed."""
        done = self.run("-m", "dovetail", *arguments, **how)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-m", "dovetail", *map(str, arguments)], env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.home,
        )  # fmt: skip


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    root = tmp_path_factory.mktemp("light")
    venv.create(root / "env", symlinks=True)
    (site,) = (root / "env/lib").glob("python*/site-packages")
    for distribution in [*dependencies().values(), *closure("pip").values()]:
        for source, place in package_files(distribution):
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            if not (site / place).exists():
                (site / place).symlink_to(source)
    (site / "dovetail.pth").write_text(f"{ROOT}\n")
    (root / "home").mkdir()
    made = Light(root / "env/bin/python", root / "home")
    done = made.run("-c", "import torch")
    assert "No module named 'torch'" in done.stderr
    return made
