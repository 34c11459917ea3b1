"""Variants as native functions, compiled on first use and kept.

A function is kept under a hash of its source, the flags and what this processor can do. If one of them changes, it
is compiled again; otherwise no compiler is needed. A kept file ends in a hash of its content. A file that a crash
or a disk has damaged is compiled again, not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dovetail.core.seams import Variant
from dovetail.host import machine
from dovetail.host.files import home, replacing
from dovetail.ops.template.cpp import SYMBOL, cpp, params
from dovetail.ops.template.errors import CompileError
from dovetail.ops.template.tracing import INSTEAD, Traced, trace

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-w"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv"),
)
GCC_FLAGS = ("-fno-thread-jumps",)  # which makes branches of conditions that decide one another, and no vectors
_SECONDS = 120
_HASH = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Compiled:
    """A variant as a function in memory:

        extern "C" void dovetail_variant(float* scores, const int32_t* k_pos, int32_t n, int32_t q_pos,
                                         int32_t head, const float* params);

    It replaces scores [n] (float32, products of query and key, scaled) by the new scores, or by -inf where the
    query at `q_pos` must not read the key at k_pos [n] (later keys included). `head` is the query head. Positions
    are in [0, 2^30). It may be called from many threads; `scores` must not overlap the other arrays.

    address: of the function, for as long as the process lives. params: float32, whose memory the caller passes.
    source: the C++. path: the file that keeps it, if it could be written. traced: what is known about the variant.
    """

    address: int
    params: np.ndarray
    source: str
    path: Path
    traced: Traced
    library: ctypes.CDLL = field(repr=False)

    def __call__(self, scores: np.ndarray, k_pos: np.ndarray, q_pos: int, head: int) -> None:
        """Run it on scores [n] (float32) in place, with k_pos [n] (int32). ValueError for other arrays."""
        for name, array, dtype in (("scores", scores, np.float32), ("k_pos", k_pos, np.int32)):
            if array.dtype != dtype or array.shape != (len(scores),) or not array.flags.c_contiguous:
                raise ValueError(f"{name} must be {np.dtype(dtype)} [{len(scores)}], contiguous")
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (scores, k_pos, self.params)]
        function = self.library[SYMBOL]
        function.restype = None
        function(*pointers[:2], len(scores), q_pos, head, pointers[2])


def compile_variant(
    variant: Variant | Traced, *, folder: Path | None = None, compilers: Sequence[str] = COMPILERS
) -> Compiled:
    """The native function of a variant, from `folder` (by default `kernels` in the cache folder) or from a
    compiler.

    compilers: names on PATH, or paths, in order of preference. Raises TraceError or CompileError, both of them
    TemplateError. Their messages say that the torch reference is used instead, which the caller must see to.
    """
    traced = variant if isinstance(variant, Traced) else trace(variant)
    source = cpp(traced.program)
    key = hashlib.sha256("\0".join([*FLAGS, *GCC_FLAGS, machine.processor(), source]).encode()).hexdigest()
    path = (folder or home() / "kernels") / f"{key}.so"
    library = _kept(path) or _compiled(source, path, compilers)
    address = ctypes.cast(library[SYMBOL], ctypes.c_void_p).value
    return Compiled(address or 0, params(traced.program), source, path, traced, library)


def _kept(path: Path) -> ctypes.CDLL | None:
    """What an earlier run compiled, if the file is undamaged and loads on this system."""
    if not _is_whole(path):
        return None
    try:
        return _load(path)
    except (OSError, AttributeError):
        return None


def _compiled(source: str, path: Path, compilers: Sequence[str]) -> ctypes.CDLL:
    """The function, compiled by the first compiler that succeeds and kept at `path`."""
    tried = []
    for name in compilers:
        if not (compiler := shutil.which(name)):
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="dovetail-") as directory:
                return _keep(_build(source, compiler, Path(directory)), path)
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            tried.append(f"{compiler}: {_told(error)}")
    if tried:
        raise CompileError(f"a variant cannot be compiled ({'; '.join(tried)}); {INSTEAD}")
    names = ", ".join(compilers) or "nothing"
    raise CompileError(
        f"no C++ compiler found (looked for {names}); install one, such as Debian's package g++; {INSTEAD}"
    )


def _keep(built: Path, path: Path) -> ctypes.CDLL:
    """Keep what was built and load it from there. If it cannot be kept, load it from where it was built."""
    binary = built.read_bytes()
    try:
        # Two processes may come here at once. Each writes a file of its own; the last one gets the name.
        with replacing(path) as file:
            file.write(binary + hashlib.sha256(binary).digest())
    except OSError as error:
        warnings.warn(f"a compiled variant cannot be kept and is compiled at every start: {error}", stacklevel=2)
        return _load(built)
    try:
        return _load(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _load(path: Path) -> ctypes.CDLL:
    """Load a library. OSError if it is none of this system, AttributeError if it lacks the function."""
    library = ctypes.CDLL(str(path))
    _ = library[SYMBOL]
    return library


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_HASH]).digest() == content[-_HASH:]


def _build(source: str, compiler: str, directory: Path) -> Path:
    text, library = directory / "variant.cpp", directory / "variant.so"
    text.write_text(source, encoding="utf-8")
    macros = _run([compiler, "-dM", "-E", "-x", "c++", os.devnull])
    flags = FLAGS if "__clang__" in macros else FLAGS + GCC_FLAGS
    _run([compiler, *flags, "-o", str(library), str(text)])
    return library


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        check=True,
    )
    return done.stdout


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        return f"exit status {error.returncode}, {' / '.join(lines[:3])}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {_SECONDS} s"
    return str(error)
