"""Runs Python programs that a model wrote, in processes that can do no harm (`evals.confine`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dovetail.core.errors import ConfigError
from dovetail.evals import confine
from dovetail.host.interrupts import uninterrupted
from dovetail.host.units import format_duration

PASSED = 86  # the exit status behind the last line; a program that ends earlier has another one
_FILE = "program"
_DONE = f"\n__import__('os')._exit({PASSED})\n"
# An import, so that a program's `if __name__ == "__main__"` does not run.
_START = f"import sys; sys.path.insert(0, ''); import {_FILE}"
_TOLD = 200  # characters of an error that are kept


@dataclass(frozen=True)
class Limits:
    """cpu: seconds of processor time. wall: seconds until the process is killed. memory: bytes of addresses."""

    cpu: int = 10
    wall: float = 60.0
    memory: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end; if not, `why`."""

    passed: bool
    why: str = ""


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program in a new temporary folder, which is also its HOME.

    It may compute, read files and import what this Python has. It starts no process or thread, opens no
    connection, reads no input, and changes no file. What it prints is lost. ConfigError where the system cannot
    confine it.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="dovetail-program-") as folder, tempfile.TemporaryFile() as errors:
        Path(folder, f"{_FILE}.py").write_text(program + _DONE, encoding="utf-8", errors="replace")
        status = _run(_command(limits), Path(folder), errors.fileno(), limits.wall)
        errors.seek(0)
        last = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2][:_TOLD]
    if status == confine.CANNOT:
        raise ConfigError(
            f"this system cannot confine programs that a model wrote ({last}), so they are not run; it takes "
            "Linux 5.13 or later with seccomp and Landlock, on x86-64 or aarch64"
        )
    return Outcome(status == PASSED, _why(status, last, limits))


def _command(limits: Limits) -> list[str]:
    first = [sys.executable, "-I", "-S", confine.__file__, str(limits.cpu), str(limits.memory)]
    return [*first, sys.executable, "-s", "-P", "-B", "-c", _START]


def _run(command: list[str], folder: Path, errors: int, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if the process was killed after `seconds`."""
    # Sets and texts are hashed the same way in every run. One thread, because no more can be started.
    environment = {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = None
    try:
        with uninterrupted():  # after an interrupt in between, nobody would know the new process
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None
    finally:
        if process is not None and process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _why(status: int | None, last: str, limits: Limits) -> str:
    if status == PASSED:
        return ""
    if status is None:
        return f"it did not end within {format_duration(limits.wall)}"
    if status == -signal.SIGXCPU:
        return f"it took more than {limits.cpu} s of processor time"
    if status < 0:
        return f"it ended with {signal.Signals(-status).name}"
    return last or f"it ended with exit status {status} before its end"
