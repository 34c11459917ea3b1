"""The AMX kernels as compiled for CPUs that have it, on one that need not: their tile instructions are trapped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

native = pytest.importorskip("dovetail._native")

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq"
FLAGS += " -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16"


@pytest.mark.skipif(not {"amx", "avx512_bf16"} & set(native.isas()), reason="their vectors need AVX-512 BF16")
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_the_compiled_kernels_on_trapped_instructions(tmp_path: Path) -> None:
    if subprocess.run(["g++", "-mamx-int8", "-E", "-x", "c", "/dev/null"], capture_output=True).returncode:
        pytest.skip("this g++ knows no AMX")
    sources = [ROOT / "csrc/isa_amx.cpp", Path(__file__).with_name("amx_trap.cpp")]
    build = ["g++", *FLAGS.split(), "-I", ROOT / "csrc", *sources, "-o", tmp_path / "trap"]
    subprocess.run(build, check=True, timeout=100)
    done = subprocess.run([tmp_path / "trap"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10000
