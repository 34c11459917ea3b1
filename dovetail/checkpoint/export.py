"""Writes a checkpoint as a Hugging Face directory, which transformers and other programs load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.core.errors import ConfigError
from dovetail.core.model import PLAIN_FORMATS, ModelConfig
from dovetail.host.files import explaining, require_space
from dovetail.ops.memory import ELEMENTS, rounded
from dovetail.text.tokenizer import Tokenizer

SHARD_BYTES = 4 << 30
_REMEDY = "choose another folder"
_PLAIN = {kind: name for name, kind in PLAIN_FORMATS.items()}


def export(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `checkpoint` to `directory` as config.json, safetensors in `dtype`, and tokenizer files.

    `dtype` is bfloat16, float16 or float32; weights are split into files of at most `shard_bytes`.
    config.json is written last, so a directory left by a crash is not taken for a model. ConfigError if the
    directory exists and is not empty, ModelError if the checkpoint cannot be read, its rope factors have no
    Hugging Face counterpart, or the directory cannot be written. What was made is removed again on failure.
    """
    directory = Path(directory)
    if dtype not in PLAIN_FORMATS.values():
        raise ConfigError(f"export dtype must be bfloat16, float16 or float32, not {dtype}")
    needed = sum(math.prod(shape) for _, shape in _tensors(checkpoint)) * ELEMENTS[dtype].itemsize
    with explaining(directory, needed, "the model", _REMEDY):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is not an empty directory")
    config = config_json(checkpoint, dtype)
    tokenizer = checkpoint.tokenizer()
    generation = checkpoint.generation_config or _generation(checkpoint.config, tokenizer)
    with explaining(directory, needed, "the model", _REMEDY), _making(directory):
        require_space(directory, needed, "the model", _REMEDY)
        _write_weights(checkpoint, directory, dtype, shard_bytes)
        _write_tokenizer(tokenizer, checkpoint.config, directory)
        _write_json(directory / "generation_config.json", generation)
        _write_json(directory / "config.json", config)
        _sync_directory(directory)
    return directory


@contextlib.contextmanager
def _making(directory: Path) -> Iterator[None]:
    """Make `directory`, which is empty or missing. If the body fails, remove its files and the folders made
    here."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=not missing)
        try:
            yield
        except BaseException:
            for path in list(directory.iterdir()):
                path.unlink(missing_ok=True)
            raise
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _write(path: Path, write: Callable[[Path], int]) -> int:
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


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _save(checkpoint: Checkpoint, names: Sequence[str], dtype: str, path: Path) -> int:
    """Write a safetensors file, one tensor at a time. Returns the bytes of its values."""
    shapes, end = dict(_tensors(checkpoint)), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * ELEMENTS[dtype].itemsize
        header[name] = {"dtype": _PLAIN[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(_values(checkpoint, name, dtype)).data)
    return end


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    return checkpoint.architecture.tensors(checkpoint.config)


def _shards(checkpoint: Checkpoint, itemsize: int, limit: int) -> Iterator[list[str]]:
    """Tensor names in groups of at most `limit` bytes (a larger tensor has a group of its own)."""
    group: list[str] = []
    size = 0
    for name, shape in _tensors(checkpoint):
        nbytes = math.prod(shape) * itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    yield group


def _write_weights(checkpoint: Checkpoint, directory: Path, dtype: str, limit: int) -> None:
    groups = list(_shards(checkpoint, ELEMENTS[dtype].itemsize, limit))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        total += _write(directory / file, partial(_save, checkpoint, names, dtype))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _values(checkpoint: Checkpoint, name: str, dtype: str) -> NDArray[Any]:
    """A tensor as a Hugging Face file has it."""
    offset = checkpoint.architecture.norm_offset
    if offset and name.endswith(NORM_SUFFIX):
        return rounded(checkpoint.tensor(name).values() - np.float32(offset), dtype)
    return checkpoint.tensor(name).values(dtype)


def export_tokenizer(tokenizer: Tokenizer, config: ModelConfig, parent: Path) -> Path:
    """A folder in `parent` from which transformers loads the tokenizer. It is named after what is in it."""
    text = tokenizer.backend.to_str(pretty=False)
    settings = json.dumps([tokenizer_settings(tokenizer, config), tokenizer.templates], sort_keys=True)
    directory = parent / hashlib.sha256(f"{settings}\n{text}".encode()).hexdigest()[:16]
    if directory.is_dir():
        return directory
    with explaining(parent, len(text), "the tokenizer"):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="partial-", ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "tokenizer"
            made.mkdir()
            _write_tokenizer(tokenizer, config, made)
            _sync_directory(made)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(made, directory)
    return directory


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    _write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=False))
    if set(tokenizer.templates) == {"default"}:
        _write_text(directory / "chat_template.jinja", tokenizer.templates["default"])
    _write_json(directory / "tokenizer_config.json", tokenizer_settings(tokenizer, config))


def tokenizer_settings(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json's object, with the chat template or all of them by name."""
    templates = tokenizer.templates
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **tokenizer.special_tokens,
    }
    if set(templates) == {"default"}:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return settings


def _generation(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_ids or config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.token_id("pad_token"),
    }


def config_json(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json's object, readable by transformers 4 and 5."""
    record = checkpoint.architecture
    return {
        "architectures": [record.hf_class],
        "model_type": record.model_type,
        **record.to_hf(checkpoint.config),
        "torch_dtype": dtype,
    }
