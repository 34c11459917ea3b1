"""Writes a checkpoint as a Hugging Face directory, which transformers and other programs load."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.core.errors import ConfigError, ModelError
from dovetail.core.model import ModelConfig
from dovetail.host.files import explaining, require_space, user_mode
from dovetail.text.tokenizer import Tokenizer

SHARD_BYTES = 4 << 30
_REMEDY = "choose another folder"


def export(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `checkpoint` to `directory` as config.json, safetensors in `dtype`, and tokenizer files.

    `dtype` is bfloat16, float16 or float32; weights are split into files of at most `shard_bytes`.
    config.json is written last, so a directory left by a crash is not taken for a model. ConfigError if the
    directory exists and is not empty, ModelError if the checkpoint cannot be read, its rope factors have no
    Hugging Face counterpart, or the directory cannot be written. What was made is removed again on failure.
    """
    directory = Path(directory)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"export dtype must be bfloat16, float16 or float32, not {dtype}")
    needed = sum(math.prod(shape) for _, shape in _tensors(checkpoint)) * dtype.itemsize
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


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, sync it, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), user_mode())  # safetensors makes its files private
            os.fsync(file.fileno())
        os.replace(temporary, path)
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


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Errors of the system are raised as OSError."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise ModelError(f"{path.parent}: the weights cannot be written: {error}") from error


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


def _write_weights(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype, limit: int) -> None:
    groups = list(_shards(checkpoint, dtype.itemsize, limit))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Cloned because values may alias the checkpoint's mapping, and shared storage is not written.
        tensors = {name: _values(checkpoint, name, dtype).clone() for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map.update(dict.fromkeys(names, file))
        _write(directory / file, lambda path, t=tensors: _save(t, path))  # type: ignore[misc]
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _values(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as a Hugging Face file has it."""
    offset = checkpoint.architecture.norm_offset
    if offset and name.endswith(NORM_SUFFIX):
        return (checkpoint.tensor(name).dequantize() - offset).to(dtype)
    return checkpoint.tensor(name).dequantize(dtype)


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    _write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=False))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **tokenizer.special_tokens,
    }
    if "default" in tokenizer.templates:
        _write_text(directory / "chat_template.jinja", tokenizer.templates["default"])
        settings["chat_template"] = tokenizer.templates["default"]
    others = {name: source for name, source in tokenizer.templates.items() if name != "default"}
    if others:
        entries = [{"name": name, "template": source} for name, source in tokenizer.templates.items()]
        settings["chat_template"] = entries
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    _write_json(directory / "tokenizer_config.json", settings)


def _generation(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_ids or config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.token_id("pad_token"),
    }


def config_json(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's object, readable by transformers 4 and 5."""
    record = checkpoint.architecture
    return {
        "architectures": [record.hf_class],
        "model_type": record.model_type,
        **record.to_hf(checkpoint.config),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
