"""How the native library was linked: with the C runtime and nothing else, so that others can run it."""

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
    assert LIBRARY.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES[:-1]))


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not installed")
def test_what_the_library_needs():
    done = subprocess.run(["readelf", "--dynamic", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    system = r"lib(m|gcc_s|c|pthread)\.so\.\d+|ld-linux.*"
    assert not [name for name in needed if not re.fullmatch(system, name)]
    assert "RPATH" not in done.stdout
    assert "RUNPATH" not in done.stdout


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not installed")
def test_a_glibc_of_2018_has_all_that_it_needs_and_nothing_else_is_shown():
    done = subprocess.run(["readelf", "--dyn-syms", "--wide", LIBRARY], capture_output=True, text=True, check=True)
    versions = re.findall(r"@GLIBC_(\d+)\.(\d+)", done.stdout)
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 27)
    defined = [
        line.split()[-1]
        for line in done.stdout.splitlines()
        if re.search(r" (GLOBAL|WEAK|UNIQUE) .* \d+ \S+$", line)
    ]
    assert defined == ["PyInit__native"]
