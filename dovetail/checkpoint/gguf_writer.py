"""Writes GGUF v3 files: metadata, the table of tensors, and blocks that are made while they are written."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.checkpoint.gguf import FORMATS
from dovetail.core.errors import ConfigError
from dovetail.host.files import explaining, replacing, require_space
from dovetail.ops.dequant import BLOCKS
from dovetail.show.progress import transfer

ALIGNMENT = 32  # bytes; what files have that say nothing else
_REMEDY = "choose another folder"
_CODES = {name: code for code, name in FORMATS.items()}
# Python types -> number of the type in a file, and how a value is packed.
_TYPES: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    bool: (7, struct.Struct("<?").pack),
    int: (4, struct.Struct("<I").pack),
    float: (6, struct.Struct("<f").pack),
    str: (8, lambda text: _string(text)),
}
_ARRAY = 9

Buffer = bytes | memoryview


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is going to be written: its GGUF name, format, and shape in torch order."""

    name: str
    format: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """ConfigError if a row is not a whole number of blocks."""
        block, row = BLOCKS[self.format], self.shape[-1]
        if row % block.values:
            raise ConfigError(
                f"{self.name}: a row of {row} is not a multiple of {self.format}'s {block.values} values"
            )
        return math.prod(self.shape) // block.values * block.bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    blocks: Callable[[NewTensor], Iterable[Buffer]],
) -> int:
    """Write a file, whole or not at all, and return its bytes. What is in its place is replaced.

    `metadata` has values of type bool, int (32 bits without sign), float, str, or a list of one of them (an
    empty list is one of strings). `blocks` gives a tensor's bytes, in pieces of any size. Only one piece at a time
    is in memory. Progress goes to stderr. ModelError if the file cannot be written or the disk has no room.
    """
    header = _header(metadata, tensors)
    total = len(header) + sum(_aligned(tensor.nbytes) for tensor in tensors)
    with explaining(path.parent, total, path.name, _REMEDY):
        require_space(path.parent, total, path.name, _REMEDY)
        with replacing(path) as file, transfer(f"Writing {path.name}", total) as advance:
            file.write(header)
            for tensor in tensors:
                end = file.tell() + tensor.nbytes
                for piece in blocks(tensor):
                    file.write(piece)
                    advance(file.tell())
                if file.tell() != end:
                    raise ValueError(f"{tensor.name}: {file.tell() - end:+d} bytes more than its shape says")
                file.write(bytes(_aligned(end) - end))
    return total


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type and bytes of a metadata value."""
    if not isinstance(value, list):
        kind, pack = _TYPES[type(value)]
        return struct.pack("<I", kind) + pack(value)
    kind, pack = _TYPES[type(value[0]) if value else str]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(map(pack, value))


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """All that comes before the first tensor's bytes."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # the fastest dimension first
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        parts.append(struct.pack("<IQ", _CODES[tensor.format], offset))
        offset += _aligned(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(_aligned(len(header)) - len(header))
