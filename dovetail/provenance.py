"""Where a measured number comes from: machine, instruction set, threads, versions, commit, configuration."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.llm import LLM

_PACKAGES = ("torch", "numpy", "tokenizers")


def provenance(llm: LLM | None = None) -> dict[str, Any]:
    """Keys machine, versions, commit, date, and with `llm` its resolved configuration as `config`."""
    found: dict[str, Any] = {
        "machine": _machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if llm is not None:
        found["config"] = llm.config.to_dict() | {"use": list(llm.config.use)}
    return found


def _machine() -> dict[str, Any]:
    from dovetail.host import machine
    from dovetail.ops.cpu import isas

    cores = machine.cores()
    facts: dict[str, Any] = {
        "cpu": machine.cpu_model(),
        "architecture": platform.machine(),
        "isa": list(machine.isa()),
        "kernels": list(isas()),
        "threads": cores.budget,
        "memory": machine.memory().total,
    }
    if gpus := _gpus():
        facts["gpus"] = gpus
    return facts


def _gpus() -> list[str]:
    from dovetail.host.lazy_torch import cuda_devices, torch

    return [torch.cuda.get_device_name(i) for i in range(cuda_devices())]


def versions() -> dict[str, str]:
    """Of the program, Python and the packages that compute."""
    from dovetail import __version__

    found = {"dovetail": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that runs, with a + if it was changed; None where it is no git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
