"""Writes safetensors files, one tensor at a time: a folder of shards with an index, or one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `dtype` as safetensors calls it, and `read` gives its values when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], NDArray[Any]]


def write_weights(directory: Path, entries: Iterable[Entry], limit: int = SHARD_BYTES) -> None:
    """model.safetensors, or numbered files of at most `limit` bytes with an index (a larger tensor has one of its
    own)."""
    groups = list(_shards(entries, limit))
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update({entry.name: file for entry in group})
        total += replaced(directory / file, partial(write_file, group))
    if len(groups) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(entries: Sequence[Entry], path: Path) -> int:
    """One file. Returns the bytes of its values."""
    end = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8).data)
    return end


def _shards(entries: Iterable[Entry], limit: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.nbytes
    yield group


def replaced(path: Path, write: Callable[[Path], int]) -> int:
    """Let `write` fill a temporary file, sync it, and only then give it its name. Returns what `write` returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        written = write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return written
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replaced(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_directory(directory: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
