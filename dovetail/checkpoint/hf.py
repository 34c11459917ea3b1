"""A Hugging Face model directory: config.json, safetensors (one file or shards), tokenizer.

Only data is read: nothing in the directory is imported or executed, and pickle files are refused.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open

from dovetail.checkpoint.architecture import Architectures, read_hf_config
from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.checkpoint.mapped import MappedFile
from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.json_file import parse_json_object, read_json_object
from dovetail.ops.dequant import BLOCKS
from dovetail.ops.stored import CUT_SHORT, StoredTensor
from dovetail.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_LARGEST = 1 << 53  # values of a tensor
_HEADER_LIMIT = 16 << 20  # bytes; 100,000 tensors need about ten million
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class _Location:
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


class HFCheckpoint:
    """See `Checkpoint`."""

    def __init__(self, path: str | os.PathLike[str], known: Architectures) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise ModelError(f"{self.path}: no config.json (and no GGUF file)")
        values = read_json_object(self.path / "config.json")
        self.generation_config: dict[str, Any] = {}
        generation = self.path / "generation_config.json"
        if generation.exists():
            self.generation_config = read_json_object(generation)
        ends = Fields(self.generation_config, str(generation))
        self.architecture, self.config = read_hf_config(values, str(self.path / "config.json"), known, ends)
        self._locations: dict[str, _Location] = {}
        self._files: dict[str, MappedFile] = {}
        self.bytes = 0
        shards, index = _shard_names(self.path)
        for shard in shards:
            self._read_shard(shard, index)
        self.files = tuple(self.path / shard for shard in shards)
        for name in index or ():
            if name not in self._locations:
                raise ModelError(f"{self.path / _INDEX}: {name} is not in {(index or {})[name]}")
        if self.config.tie_word_embeddings and not self._tied():
            _LOG.warning(
                "%s: config.json says tie_word_embeddings, but %s holds other values than %s; they are used",
                self.path, _HEAD, _EMBEDDING,
            )  # fmt: skip
            self.config = replace(self.config, tie_word_embeddings=False)

    def _tied(self) -> bool:
        """Whether the files have no head of their own, or one that is the embedding."""
        if _HEAD not in self._locations or _EMBEDDING not in self._locations:
            return True
        head, embedding = self.tensor(_HEAD), self.tensor(_EMBEDDING)
        if (head.format, head.shape) != (embedding.format, embedding.shape):
            return False
        rows = 4096  # at a time, so that a difference is found early
        return all(
            np.array_equal(head.data[at : at + rows], embedding.data[at : at + rows])
            for at in range(0, len(head.data), rows)
        )

    def _read_shard(self, shard: str, index: dict[str, str] | None) -> None:
        path = self.path / shard
        if not path.is_file():
            raise ModelError(f"{path}: is listed in {_INDEX} but does not exist")
        header, start = read_header(path)
        self._files[shard] = _open(path)
        self.bytes += path.stat().st_size
        for name, entry in header.items():
            if name in self._locations:
                raise ModelError(f"{path}: tensor {name} is also in {self._locations[name].shard}")
            if index is not None and index.get(name) != shard:
                raise ModelError(f"{path}: tensor {name} is not listed for this file in {_INDEX}")
            begin, end = (start + at for at in entry["data_offsets"])
            self._locations[name] = _Location(shard, entry["dtype"], tuple(entry["shape"]), begin, end)

    def names(self) -> list[str]:
        return list(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def format(self, name: str) -> str:
        return "F32" if self._offset(name) else self._find(name).dtype

    def tensor(self, name: str) -> StoredTensor:
        found = self._find(name)
        if found.dtype not in PLAIN_FORMATS:
            known = ", ".join(PLAIN_FORMATS)
            raise ModelError(f"{self.path / found.shard}: tensor {name} is {found.dtype}; supported are {known}")
        data = self._files[found.shard].array(name, found.begin, found.end - found.begin)
        count = math.prod(found.shape)
        rows = count // found.shape[-1] if found.shape and found.shape[-1] else 1
        stored = StoredTensor(name, found.dtype, found.shape, data.reshape(rows, -1))
        if offset := self._offset(name):
            return StoredTensor.of(name, stored.values() + np.float32(offset))
        return stored

    def release(self, name: str) -> None:
        found = self._find(name)
        self._files[found.shard].release(found.begin, found.end - found.begin)

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_directory(self.path, self.config.eos_token_ids)
        for token in tokenizer.encode(""):
            if token >= self.config.vocab_size:
                raise ModelError(
                    f"{self.path / 'tokenizer.json'}: puts token {token} into every text, and the model has "
                    f"{self.config.vocab_size} tokens"
                )
        return tokenizer

    def _offset(self, name: str) -> float:
        """What the file leaves out of a tensor's values."""
        return self.architecture.norm_offset if name.endswith(NORM_SUFFIX) else 0.0

    def _find(self, name: str) -> _Location:
        if name not in self._locations:
            raise ModelError(f"{self.path}: has no tensor {name!r}")
        return self._locations[name]
