"""How the native library was linked: one OpenMP runtime in the process, nothing of the machine that built it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(importlib.util.find_spec("dovetail._native").origin)
TORCH = Path(importlib.util.find_spec("torch").origin).parent
RENAMED = [*TORCH.glob("lib/libgomp-*"), *TORCH.parent.glob("torch.libs/libgomp-*")]

COPIES = """
import sys
from pathlib import Path

for name in sys.argv[1:]:
    __import__(name)
maps = Path("/proc/self/maps").read_text().splitlines()
files = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
print(*sorted(f for f in files if "gomp" in Path(f).name), sep="\\n")
"""


@pytest.mark.skipif(RENAMED, reason="this torch's libgomp has a name of its own, as up to 2.7")
@pytest.mark.parametrize("order", [("torch", "dovetail._native"), ("dovetail._native", "torch")], ids="-".join)
def test_one_openmp_runtime(order):
    command = [sys.executable, "-c", COPIES, *order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert len(done.stdout.split("\n")) == 2, done.stdout


def test_the_library_is_for_this_python():
    assert LIBRARY.parent.name == "dovetail"
    assert LIBRARY.name.endswith(importlib.machinery.EXTENSION_SUFFIXES[0])


def test_no_openmp_later_than_torchs_libgomp_has():
    # The versions are names in the table of dynamic strings.
    versions = re.findall(rb"\0(G?OMP)_(\d)\.(\d)(?=\0)", LIBRARY.read_bytes())
    assert (b"GOMP", b"4", b"0") in versions
    assert max((int(major), int(minor)) for _, major, minor in versions) <= (4, 5)


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not installed")
def test_what_the_library_needs():
    done = subprocess.run(["readelf", "--dynamic", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert "libgomp.so.1" in needed
    system = r"lib(gomp|stdc\+\+|m|gcc_s|c|pthread)\.so\.\d+|ld-linux.*"
    assert not [name for name in needed if not re.fullmatch(system, name)]
    assert "RPATH" not in done.stdout
    assert "RUNPATH" not in done.stdout
