"""How the native library was linked: with the C and C++ runtimes and nothing else."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(importlib.util.find_spec("dovetail._native").origin)


def test_the_library_is_for_this_python():
    assert LIBRARY.parent.name == "dovetail"
    assert LIBRARY.name.endswith(importlib.machinery.EXTENSION_SUFFIXES[0])


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not installed")
def test_what_the_library_needs():
    done = subprocess.run(["readelf", "--dynamic", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    system = r"lib(stdc\+\+|m|gcc_s|c|pthread)\.so\.\d+|ld-linux.*"
    assert not [name for name in needed if not re.fullmatch(system, name)]
    assert "RPATH" not in done.stdout
    assert "RUNPATH" not in done.stdout
