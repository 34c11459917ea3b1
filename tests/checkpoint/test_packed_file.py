"""Files of packed weights: what is read is what was written, or it is noticed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.checkpoint import packed_file
from dovetail.checkpoint.packed_file import ALIGNMENT, file_bytes, load, store
from dovetail.hub.packed import Origin, Unusable, header, packed_files, read_header
from dovetail.ops.dequant import BLOCKS

native = pytest.importorskip("dovetail._native")
ORIGIN = Origin("/models/some.gguf", "abc", "stored", 1)
SHAPES = {"a": ("Q4_K", 16, 256), "b": ("F32", 3, 5), "c": ("Q8_0", 40, 64)}


def packed(name: str, n: int, k: int, seed: int = 0) -> Any:
    block = BLOCKS[name]
    rows = np.random.default_rng(seed).integers(0, 256, (n, k // block.values * block.bytes), dtype=np.uint8)
    return native.Packed(name, rows.ctypes.data, rows.strides[0], n, k, 1)


WEIGHTS = {name: packed(*shape) for name, shape in SHAPES.items()}


def equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    def facts(p: Any) -> tuple[str, int, int, bytes]:
        return p.format, p.n, p.k, p.data.tobytes()

    return {n: facts(p) for n, p in found.items()} == {n: facts(p) for n, p in wanted.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    store(tmp_path / "x.packed", ORIGIN, WEIGHTS)
    return tmp_path / "x.packed"


def test_what_is_written_is_read(file: Path) -> None:
    found = load(file, ORIGIN, 2)
    assert not found.damaged
    assert equal(found.packed, WEIGHTS)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert 0 <= file_bytes(ORIGIN, WEIGHTS) - file.stat().st_size < ALIGNMENT
    assert [(e.model, e.size) for e in packed_files(file.parent)] == [(ORIGIN.model, file.stat().st_size)]


def test_tensors_begin_at_multiples_of_4096_bytes(file: Path) -> None:
    data = file.read_bytes()
    with open(file, "rb") as opened:
        _, tensors, length = read_header(opened)
    start = -(-length // ALIGNMENT) * ALIGNMENT
    assert list(tensors) == list(SHAPES)
    for name, place in tensors.items():
        assert place["offset"] % ALIGNMENT == 0
        at = start + place["offset"]
        assert data[at : at + place["bytes"]] == WEIGHTS[name].data.tobytes()


def harmless(path: Path, data: bytes) -> bool:
    """Whether a file of these bytes is refused, or gives no other weights than the right ones."""
    path.write_bytes(data)
    try:
        found = load(path, ORIGIN, 1)
    except Unusable:
        return True
    good = {name: p for name, p in WEIGHTS.items() if name not in found.damaged}
    return equal(found.packed, good)


def test_any_flipped_bit_is_noticed_or_harmless(file: Path) -> None:
    data = bytearray(file.read_bytes())
    header = data.index(b"\0" * 64)
    places = [*range(header), *range(header, len(data), 31)]
    for at in places:
        data[at] ^= 1 << at % 8
        assert harmless(file, data), at
        data[at] ^= 1 << at % 8
    assert not load(file, ORIGIN, 1).packed.keys() - WEIGHTS.keys()


def test_a_damaged_tensor_is_named_and_the_others_are_used(file: Path) -> None:
    data = file.read_bytes()
    middle = WEIGHTS["b"].data.tobytes()
    at = data.index(middle)
    file.write_bytes(data[:at] + bytes([middle[0] ^ 1]) + data[at + 1 :])
    found = load(file, ORIGIN, 1)
    assert found.damaged == ["b"]
    assert equal(found.packed, {n: p for n, p in WEIGHTS.items() if n != "b"})


def test_any_shorter_file_is_noticed_or_harmless(file: Path) -> None:
    data = file.read_bytes()
    for size in [*range(600), *range(600, len(data), 97)]:
        assert harmless(file, data[:size]), size


@pytest.mark.parametrize(
    ("change", "why"),
    [({"source": "abd"}, "model has changed"), ({"layout": 2}, "version"), ({"values": "bfloat16"}, "values")],
)
def test_files_of_something_else_are_refused(file: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(Unusable, match=why):
        load(file, replace(ORIGIN, **change), 1)
    assert load(file, replace(ORIGIN, model="/a/link/to/some.gguf"), 1).packed


@pytest.mark.parametrize("data", [b"", b"dovetail packed\n", b"GGUF" * 100, b"dovetail packed\n" + b"\xff" * 99])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.packed").write_bytes(data)
    with pytest.raises(Unusable):
        load(tmp_path / "x.packed", ORIGIN, 1)
    assert [e.model for e in packed_files(tmp_path)] == [""]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70)), max_size=5),
    chunk=st.integers(1, 9000),
    most=st.integers(1, 5000),
)
def test_the_file_does_not_depend_on_how_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], chunk: int, most: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    weights = {f"w{i}": packed("F32", n, k, i) for i, (n, k) in enumerate(sizes)}
    store(folder / "whole", ORIGIN, weights)

    def short(handle: int, buffers: list[memoryview]) -> int:
        """As a system that writes few bytes at a time."""
        return os.write(handle, b"".join(buffers)[:most])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_file, "_WRITE", chunk * 64)
        patch.setattr(os, "writev", short)
        store(folder / "pieces", ORIGIN, weights)
    assert (folder / "whole").read_bytes() == (folder / "pieces").read_bytes()
    assert equal(load(folder / "pieces", ORIGIN, 2).packed, weights)


def test_progress_is_told_and_may_end_the_writing(tmp_path: Path) -> None:
    told: list[int] = []
    store(tmp_path / "x.packed", ORIGIN, WEIGHTS, told.append)
    assert told == sorted(told)
    assert told[-1] == (tmp_path / "x.packed").stat().st_size
    before = (tmp_path / "x.packed").read_bytes()

    def stop(done: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store(tmp_path / "x.packed", ORIGIN, {"other": packed("F32", 4, 4)}, stop)
    assert [p.name for p in tmp_path.iterdir()] == ["x.packed"]
    assert (tmp_path / "x.packed").read_bytes() == before


def test_places_that_another_version_describes_are_refused(tmp_path: Path) -> None:
    place = {"format": "F32", "n": 1, "k": 1, "offset": 0, "bytes": 4, "checksum": 0}
    for tensors in ({"w": place | {"device": "gpu"}}, {"w": {"format": "F32"}}, {"w": [1]}, ["w"]):
        (tmp_path / "f").write_bytes(header(ORIGIN, tensors).ljust(2 * ALIGNMENT, b"\0"))  # type: ignore[arg-type]
        with pytest.raises(Unusable, match="another version"):
            load(tmp_path / "f", ORIGIN, 1)


def test_a_place_outside_of_the_file_is_refused(file: Path) -> None:
    with open(file, "rb") as opened:
        mapping = native.Mapping(opened.fileno(), file.stat().st_size)
    for offset in (1, 1 << 40, file.stat().st_size, file.stat().st_size // 64 * 64 - 64, (1 << 64) - 64):
        with pytest.raises(ValueError, match="outside"):
            mapping.packed("F32", 16, 32, offset)
    with pytest.raises(ValueError, match="outside"):
        mapping.packed("F32", 0, 32, 0)


def test_mapped_weights_are_the_page_cache_and_outlive_the_file(file: Path) -> None:
    found = load(file, ORIGIN, 1).packed
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    assert [line.split()[1] for line in lines] == ["r--s"]
    file.unlink()
    assert equal(found, WEIGHTS)


def words(data: np.ndarray) -> int:
    return int(native.checksums([(data.ctypes.data, data.nbytes)], 1)[0])


@given(size=st.integers(0, 400), seed=st.integers(0, 99), at=st.integers(0, 399), bit=st.integers(0, 7))
def test_checksums_tell_lengths_places_and_single_bits(size: int, seed: int, at: int, bit: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, size + 1, dtype=np.uint8)
    whole = words(data)
    assert words(data.copy()) == whole
    assert words(data[:-1]) != whole
    assert words(np.append(data, np.uint8(0))) != whole
    changed = data.copy()
    changed[at % len(data)] ^= 1 << bit
    assert words(changed) != whole
    if len(data) >= 144 and (data[:8] != data[64:72]).any():
        swapped = data.copy()
        swapped[:8], swapped[64:72] = data[64:72], data[:8]
        assert words(swapped) != whole


def test_checksums_do_not_depend_on_threads() -> None:
    data = np.random.default_rng(0).integers(0, 256, (5 << 20) + 77, dtype=np.uint8)
    at = data.ctypes.data
    ranges = [(at, data.nbytes), (at + 64, 3 << 20), (at, 0), (at + 5, 1)]
    assert native.checksums(ranges, 1) == native.checksums(ranges, 3)
    assert len(set(native.checksums(ranges, 1))) == 4
