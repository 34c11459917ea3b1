"""Decide which build of torch `pip` may install here, before gigabytes are on their way.

On a plain package index torch for x86-64 Linux is the CUDA build. This asks pip what it would install and
stops, with the choices, if that is CUDA on a machine that has no NVIDIA GPU. Standard library only: it runs
before anything else is installed. Exit status: 0 go on, 3 the user must choose, 1 pip could not answer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

EXIT_FAILED = 1
EXIT_CHOOSE = 3

_CUDA_PACKAGE = re.compile(r"(nvidia|cuda)-", re.IGNORECASE)
_COLLECTING = re.compile(r"Collecting ([A-Za-z0-9._-]+)")
_TORCH_WHEEL = re.compile(r"(?:Downloading|Using cached) torch-\S+ \(([\d.]+) ([kMG])B\)")
# The CPU build's wheel has about 200 MB, the CUDA builds' 500 MB and more.
_CUDA_WHEEL_MB = 400

_CHOICES = """\
This machine shows no NVIDIA GPU, but from the package index in use pip would install torch built for CUDA
({found}): several GB to download. Choose one:

  make {target} TORCH_INDEX_URL=URL
      torch's CPU build, about 200 MB. URL is the CPU wheel index that pytorch.org shows
      under "Get Started" (Linux, Pip, Python, CPU: the address after --index-url).
  make {target} PIP_FIND_LINKS=FOLDER
      a CPU wheel of torch that you have in FOLDER.
  make {target} CUDA=1
      the CUDA build all the same.
"""


def requirement(pyproject: Path) -> str:
    """The torch requirement of the project file."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if re.match(r"torch\b(?!\w)", line))


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA driver shows a device or brings its tool."""
    return (root / "dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def cuda_in_log(lines: Iterable[str]) -> str | None:
    """What in pip's output, read as it comes, shows that it is fetching a CUDA build; None if nothing."""
    for line in lines:
        if (match := _COLLECTING.search(line)) and _CUDA_PACKAGE.match(match[1]):
            return match[1]
        if match := _TORCH_WHEEL.search(line):
            megabytes = float(match[1]) * {"k": 1e-3, "M": 1.0, "G": 1e3}[match[2]]
            if megabytes > _CUDA_WHEEL_MB:
                return f"a torch wheel of {megabytes:.0f} MB"
    return None


def cuda_in_report(report: dict[str, Any]) -> str | None:
    """The first CUDA package in pip's installation report, if there is one."""
    names = [entry["metadata"]["name"] for entry in report.get("install", [])]
    return next((name for name in names if _CUDA_PACKAGE.match(name)), None)


def ask_pip(wanted: str) -> str | None:
    """What CUDA package pip would bring for `wanted`, None if none. Raises RuntimeError with pip's words."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        log: deque[str] = deque(maxlen=8)
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", str(report)]
        command += ["--progress-bar", "off", "--no-input", "--disable-pip-version-check", wanted]
        # Its own temporary folder, so that stopping pip in the middle leaves nothing behind.
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}
        environment.pop("PIP_QUIET", None)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as pip:
            if found := cuda_in_log(_kept(pip.stdout or (), log)):
                pip.kill()
                return found
        if pip.returncode != 0:
            raise RuntimeError("".join(log).strip())
        return cuda_in_report(json.loads(report.read_text(encoding="utf-8")))


def _kept(lines: Iterable[str], log: deque[str]) -> Iterator[str]:
    for line in lines:
        log.append(line)
        yield line


def install_from(index: str, wanted: str) -> int:
    """Install `wanted` from the wheel index that the user named; pip's exit status."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--index-url",
        index,
        wanted,
    ]
    return subprocess.run(command, check=False).returncode


def main(target: str) -> int:
    wanted = requirement(Path(__file__).resolve().parent.parent / "pyproject.toml")
    if index := os.environ.get("TORCH_INDEX_URL"):
        return EXIT_FAILED if install_from(index, wanted) else 0
    if os.environ.get("CUDA") == "1" or has_gpu():
        return 0
    try:
        found = ask_pip(wanted)
    except RuntimeError as error:
        print(f"setup: pip cannot find {wanted}:\n{error}", file=sys.stderr)
        return EXIT_FAILED
    if found:
        print(_CHOICES.format(found=found, target=target), file=sys.stderr)
        return EXIT_CHOOSE
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "run"))
