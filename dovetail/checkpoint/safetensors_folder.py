"""The safetensors files of a folder, one or several with an index: mapped, and checked before they are used."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dovetail.checkpoint.mapped import MappedFile
from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.json_file import parse_json_object, read_json_object
from dovetail.ops.dequant import BLOCKS
from dovetail.ops.memory import from_bfloat16
from dovetail.ops.stored import CUT_SHORT

_LOG = logging.getLogger(__name__)
_LARGEST = 1 << 53  # values of a tensor
_HEADER_LIMIT = 16 << 20  # bytes; 100,000 tensors need about ten million
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NUMPY: dict[str, Any] = {  # dtypes of parts of quantized weights: how numpy has them
    "I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8,
}  # fmt: skip
_SIZES = {kind: np.dtype(numpy).itemsize for kind, numpy in _NUMPY.items()}


@dataclass(frozen=True)
class Location:
    """A tensor's file and, as its header says, dtype, shape, and where its bytes begin and end in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where in the file its offsets begin to count.

    The header is name -> {dtype, shape, data_offsets}, without `__metadata__`.

    Checks what the safetensors library does not: duplicate names, JSON depth, a tighter size limit.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length == 0 or length > size - 8:
                raise ModelError(
                    f"{path}: header length {length} does not fit a file of {size} bytes; {CUT_SHORT}"
                )
            if length > _HEADER_LIMIT:
                raise ModelError(f"{path}: header length {length} exceeds {_HEADER_LIMIT} bytes")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if text[:1] != b"{":
        raise ModelError(f"{path}: header does not begin with '{{'")
    header = parse_json_object(text, f"{path}: header")
    header.pop("__metadata__", None)
    end = (
        8
        + length
        + max((_end(entry, f"{path}: tensor {name[:80]!r}") for name, entry in header.items()), default=0)
    )
    if end > size:
        raise ModelError(f"{path}: its tensors end at {end}, the file at {size}; {CUT_SHORT}")
    return header, 8 + length


def _end(entry: Any, where: str) -> int:
    """Where a tensor ends. ModelError that names the tensor and the field if its entry is malformed.

    What tensors have to do with each other is left to the safetensors library.
    """
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: its entry must be an object, it is {str(entry)[:64]!r}")
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ModelError(f"{where}: dtype must be a name, it is {str(dtype)[:64]!r}")
    if not _sizes(shape):
        raise ModelError(f"{where}: shape must be a list of integers from 0 on, it is {str(shape)[:64]!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: data_offsets must be where it begins and ends, they are {str(offsets)[:64]!r}")
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST:
            raise ModelError(f"{where}: shape {str(shape)[:64]} has more than 2^53 values")
    given = offsets[1] - offsets[0]
    if dtype in PLAIN_FORMATS and count * BLOCKS[dtype].bytes != given:
        raise ModelError(f"{where}: {dtype} of shape {str(shape)[:64]} does not have {given} bytes")
    return int(offsets[1])


def _sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _open(path: Path) -> MappedFile:
    """The file, after the safetensors library has checked its header."""
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ModelError(f"{path}: {error}") from error
    return MappedFile(path)


def _shard_names(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files, and the index's tensor -> file map if it is used.

    Where there is both model.safetensors and an index of other files, transformers reads the former, and so do we.
    """
    index = directory / _INDEX
    weights = _weight_map(index) if index.exists() else None
    if (directory / _SINGLE).exists():
        others = set((weights or {}).values()) - {_SINGLE}
        if others:
            _LOG.warning(
                "%s is read; the %d other files that %s names are not", directory / _SINGLE, len(others), _INDEX
            )
        return [_SINGLE], None
    if weights is not None:
        return sorted(set(weights.values())), weights
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise ModelError(f"{directory}: {len(found)} safetensors files but no {_INDEX}")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ModelError(
            f"{directory / pickles[0]}: pickle checkpoints can run code when loaded; convert it to safetensors"
        )
    raise ModelError(f"{directory}: no safetensors file")


def _weight_map(index: Path) -> dict[str, str]:
    weights = read_json_object(index, limit=64 << 20).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{index}: weight_map must be a non-empty object")
    for tensor, shard in weights.items():
        # A plain name cannot leave the directory. (Links are fine: the Hugging Face cache is made of them.)
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise ModelError(f"{index}: {tensor[:80]}: {str(shard)[:80]!r} is not a safetensors file name")
    return weights


class SafetensorsFolder:
    """All tensors of a folder's safetensors files, by name. ModelError for files that are broken or contradict
    each other.

    files: those that hold tensors; bytes: their size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._locations: dict[str, Location] = {}
        self._maps: dict[str, MappedFile] = {}
        self._modules: dict[str, list[str]] | None = None
        shards, index = _shard_names(path)
        for shard in shards:
            self._read_shard(shard, index)
        self.files = tuple(path / shard for shard in shards)
        for name in index or ():
            if name not in self._locations:
                raise ModelError(f"{path / _INDEX}: {name} is not in {(index or {})[name]}")

    def _read_shard(self, shard: str, index: dict[str, str] | None) -> None:
        path = self.path / shard
        if not path.is_file():
            raise ModelError(f"{path}: is listed in {_INDEX} but does not exist")
        header, start = read_header(path)
        self._maps[shard] = _open(path)
        self.bytes += path.stat().st_size
        for name, entry in header.items():
            if name in self._locations:
                raise ModelError(f"{path}: tensor {name} is also in {self._locations[name].shard}")
            if index is not None and index.get(name) != shard:
                raise ModelError(f"{path}: tensor {name} is not listed for this file in {_INDEX}")
            begin, end = (start + at for at in entry["data_offsets"])
            self._locations[name] = Location(shard, entry["dtype"], tuple(entry["shape"]), begin, end)

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def names(self) -> list[str]:
        return list(self._locations)

    def of(self, module: str) -> list[str]:
        """The names that are `module`, a dot, and one more part."""
        if self._modules is None:
            self._modules = {}
            for name in self._locations:
                self._modules.setdefault(name.rpartition(".")[0], []).append(name)
        return self._modules.get(module, [])

    def modules(self) -> list[str]:
        """What stands before the last dot of the names, in order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self._locations))

    def find(self, name: str) -> Location:
        """Where a tensor is; ModelError if there is none of that name."""
        if name not in self._locations:
            raise ModelError(f"{self.path}: has no tensor {name!r}")
        return self._locations[name]

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.path / self.find(name).shard

    def data(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 [n], not copied."""
        found = self.find(name)
        return self._maps[found.shard].array(name, found.begin, found.end - found.begin)

    def array(self, name: str, *kinds: str) -> NDArray[Any]:
        """A tensor as numpy has it: bfloat16 and float16 as float32, 8-bit floats as their bytes.

        kinds: the dtypes that are expected, as safetensors calls them; ModelError for another one.
        """
        found = self.find(name)
        if found.dtype not in kinds:
            raise ModelError(
                f"{self.file(name)}: tensor {name} is {found.dtype}; expected is {' or '.join(kinds)}"
            )
        values = np.ascontiguousarray(self.data(name)).view(np.uint8)
        if values.ctypes.data % _SIZES[found.dtype]:
            values = values.copy()
        typed = values.view(_NUMPY[found.dtype]).reshape(found.shape)
        if found.dtype == "BF16":
            return from_bfloat16(typed)
        return typed.astype(np.float32) if found.dtype == "F16" else typed

    def release(self, name: str) -> None:
        """Take a tensor's bytes out of this process' memory, until they are read again."""
        found = self.find(name)
        self._maps[found.shard].release(found.begin, found.end - found.begin)
