"""The cache of packed weights: used when it is right, made again when it is not, and never in the way."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.checkpoint import packed_cache
from dovetail.checkpoint.packed_cache import PackedCache
from dovetail.host.files import exclusive_or_not
from tests.checkpoint.test_packed_file import equal, packed

pytest.importorskip("dovetail._native")
WEIGHTS = {"a": packed("Q4_K", 16, 256), "b": packed("F32", 20, 8), "c": packed("Q8_0", 16, 64)}
ROOM = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(300_000))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "packed"


def opened(model: Path, folder: Path, limit: int = ROOM, values: str = "stored") -> PackedCache:
    checkpoint: Any = SimpleNamespace(path=model, files=(model,))
    cache = PackedCache(checkpoint, folder, limit, values)
    cache.open(1)
    return cache


def ready(cache: PackedCache, weights: dict[str, Any] = WEIGHTS) -> dict[str, Any]:
    found = {name: cache.get(name, (w.n, w.k)) for name, w in weights.items()}
    return {name: w for name, w in found.items() if w is not None}


def start(model: Path, folder: Path, weights: dict[str, Any] = WEIGHTS, **more: Any) -> list[str]:
    """As a process does: take what is ready (which must be right), add the rest, write. What was ready."""
    cache = opened(model, folder, **more)
    found = ready(cache, weights)
    assert equal(found, {name: weights[name] for name in found})
    for name in weights.keys() - found.keys():
        cache.add(name, weights[name])
    cache.save()
    cache.finish()
    return sorted(found)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock" and p.name != ".lock")


def test_the_second_start_has_all_and_writes_nothing(model: Path, folder: Path, capsys: Any) -> None:
    assert start(model, folder) == []
    (name,) = files(folder)
    inode = (folder / name).stat().st_ino
    assert start(model, folder) == ["a", "b", "c"]
    assert files(folder) == [name]
    assert (folder / name).stat().st_ino == inode
    assert capsys.readouterr().err == ""


def test_only_what_is_missing_is_packed_and_the_rest_is_kept(model: Path, folder: Path) -> None:
    start(model, folder, {"a": WEIGHTS["a"]})
    assert start(model, folder, {"b": WEIGHTS["b"]}) == []
    assert start(model, folder) == ["a", "b"]
    assert start(model, folder) == ["a", "b", "c"]


def test_another_shape_is_not_taken(model: Path, folder: Path) -> None:
    start(model, folder)
    assert opened(model, folder).get("a", (256, 16)) is None


def test_other_values_have_a_file_of_their_own(model: Path, folder: Path) -> None:
    start(model, folder)
    assert start(model, folder, values="bfloat16") == []
    assert len(files(folder)) == 2
    assert start(model, folder) == start(model, folder, values="bfloat16") == ["a", "b", "c"]


def rewritten(model: Path) -> None:
    """The same size and time of change, other bytes."""
    before = model.stat()
    model.write_bytes(os.urandom(before.st_size))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


def longer(model: Path) -> None:
    before = model.stat()
    model.write_bytes(model.read_bytes() + b"x")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


def touched(model: Path) -> None:
    os.utime(model, ns=(1, 1))


@pytest.mark.parametrize("change", [rewritten, longer, touched])
def test_another_model_under_the_same_name_is_packed_again(
    model: Path, folder: Path, change: Any, capsys: Any
) -> None:
    start(model, folder)
    change(model)
    assert start(model, folder) == []
    assert capsys.readouterr().err.count("\n") == 1
    assert len(files(folder)) == 1
    assert start(model, folder) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:5000],
        lambda data: b"something else" + data,
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:-20000] + b"\xff" * 64 + data[-19936:],
    ],
    ids=["empty", "truncated", "foreign", "header", "tensor"],
)
def test_a_broken_file_is_made_again_with_one_note(model: Path, folder: Path, spoil: Any, capsys: Any) -> None:
    big = {"big": packed("F32", 640, 32), **WEIGHTS, "last": packed("F32", 640, 32)}
    start(model, folder, big)
    (path,) = folder.glob("*.packed")
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert len(start(model, folder, big)) < len(big)
    assert capsys.readouterr().err.count("\n") == 1
    assert start(model, folder, big) == sorted(big)
    assert capsys.readouterr().err == ""


def test_another_layout_is_packed_again(model: Path, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    start(model, folder)
    real = packed_cache.cpu.native()
    fake = SimpleNamespace(layout=lambda: real.layout() + 1, checksums=real.checksums, Mapping=real.Mapping)
    monkeypatch.setattr(packed_cache.cpu, "native", lambda: fake)
    assert start(model, folder) == []
    assert "another version" in capsys.readouterr().err
    assert start(model, folder) == ["a", "b", "c"]


def test_whoever_comes_second_writes_nothing_and_says_nothing(model: Path, folder: Path, capsys: Any) -> None:
    with exclusive_or_not(folder / ".lock") as mine:
        assert mine
        assert start(model, folder) == []
        assert files(folder) == []
    assert start(model, folder) == []
    assert start(model, folder) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


PROGRAM = """
import sys
from pathlib import Path
from tests.checkpoint.test_packed_cache import start
print(start(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_processes_at_once_leave_one_whole_file(model: Path, folder: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(model), str(folder)]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "12"]
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out in (b"[]\n", b"['a', 'b', 'c']\n")
        assert err == b""
    assert len(files(folder)) == 1
    assert start(model, folder) == ["a", "b", "c"]


def test_a_full_disk_is_noted_once_and_nothing_stays(
    model: Path, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        assert start(model, folder) == []
    assert files(folder) == []
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left" in err
    assert "--packed-cache off" in err


def test_on_a_terminal_notes_wait_for_the_end(model: Path, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    start(model, folder, limit=4000)
    assert capsys.readouterr().err == ""
    packed_cache.finish()
    assert capsys.readouterr().err.count("\n") == 1
    packed_cache.finish()
    assert capsys.readouterr().err == ""


def test_a_disk_that_would_be_full_is_not_filled(model: Path, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(packed_cache, "free_bytes", lambda folder: packed_cache.FREE + 1000)
    start(model, folder)
    assert files(folder) == []
    assert "are free in" in capsys.readouterr().err


def test_a_file_size_limit_of_the_system(model: Path, folder: Path, capsys: Any) -> None:
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        assert start(model, folder) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "File too large" in err
    assert files(folder) == []


def test_a_folder_that_cannot_be_made(model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert start(model, tmp_path / "file" / "packed") == []
    err = capsys.readouterr().err
    assert "not kept" in err


def test_a_folder_that_may_not_be_written(model: Path, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    start(model, folder)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("dovetail.host.files.tempfile.mkstemp", refuse)
    assert start(model, folder) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert start(model, folder, WEIGHTS | {"d": packed("F32", 16, 16)}) == ["a", "b", "c"]
    assert "Read-only" in capsys.readouterr().err


def test_more_than_the_bound_is_not_written(model: Path, folder: Path, capsys: Any) -> None:
    start(model, folder, limit=4000)
    assert files(folder) == []
    assert "--packed-cache-size" in capsys.readouterr().err


def test_what_was_used_longest_ago_goes_first(folder: Path, tmp_path: Path) -> None:
    models = []
    for i in range(4):
        models.append(tmp_path / f"model{i}.gguf")
        models[-1].write_bytes(os.urandom(10_000))
    size = 0
    for i, model in enumerate(models[:3]):
        start(model, folder)
        (path,) = folder.glob(f"model{i}*")
        os.utime(path, (1000 + i, 1000 + i))
        size = path.stat().st_size
    start(models[0], folder)  # used now
    start(models[3], folder, limit=3 * size + 5000)
    assert [name[:6] for name in files(folder)] == ["model0", "model2", "model3"]
    models[0].unlink()  # its weights go, although there is room
    os.utime(models[3], ns=(5, 5))
    start(models[3], folder)
    assert [name[:6] for name in files(folder)] == ["model2", "model3"]


def test_leftovers_of_killed_processes_go(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".x.packed.abc.part").write_bytes(b"half")
    start(model, folder)
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("end", ["abandon", "ctrl-c"])
def test_writing_can_be_abandoned(model: Path, folder: Path, monkeypatch: Any, end: str, capsys: Any) -> None:
    cache = opened(model, folder)
    for name, w in WEIGHTS.items():
        cache.add(name, w)
    begun, go_on = threading.Event(), threading.Event()
    write = os.writev

    def slow(*arguments: Any) -> int:
        begun.set()
        go_on.wait()
        return write(*arguments)

    monkeypatch.setattr(os, "writev", slow)
    cache.save()
    begun.wait()

    def interrupt(*_: Any) -> None:
        threading.Timer(0.01, go_on.set).start()
        raise KeyboardInterrupt

    if end == "ctrl-c":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(packed_cache, "transfer", interrupt)
        monkeypatch.setattr(packed_cache, "_PATIENCE", 0.01)
        cache.finish(progress=True)
    else:
        threading.Timer(0.01, go_on.set).start()
        packed_cache.abandon()
    assert files(folder) == []
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    start(model, folder)
    assert len(files(folder)) == 1
