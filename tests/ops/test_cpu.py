"""The extension module: absent, or there and broken."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dovetail
from dovetail.ops import cpu


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """`cpu.native`, unremembered, in a process that cannot load the module."""
    monkeypatch.delattr(dovetail, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "dovetail._native", None)
    return cpu.native.__wrapped__


def test_an_extension_that_was_not_built_is_no_news(absent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "extension_file", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert absent() is None


def test_an_extension_that_does_not_load_is_told_of(absent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "extension_file", lambda: "/somewhere/_native.so")
    with pytest.warns(UserWarning, match=r"because /somewhere/_native.so does not load: .*_native"):
        assert absent() is None


def test_its_file_is_found_though_it_does_not_load(tmp_path: Path) -> None:
    """A copy of the package's folder that holds a file which is no library."""
    suffix = __import__("importlib.machinery").machinery.EXTENSION_SUFFIXES[0]
    package = tmp_path / "dovetail"
    package.mkdir()
    for entry in Path(dovetail.__file__).parent.iterdir():
        if not entry.name.startswith("_native") and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / f"_native{suffix}").write_text("no library")
    code = (  # without the finder of an editable install
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
        "from dovetail.ops import cpu; print(cpu.isas())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "()\n"
    assert f"_native{suffix} does not load" in done.stderr
