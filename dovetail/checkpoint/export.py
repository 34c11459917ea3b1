"""Writes a checkpoint as a Hugging Face directory, which transformers and other programs load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.checkpoint.safetensors_writer import (
    SHARD_BYTES,
    Entry,
    sync_directory,
    write_json,
    write_text,
    write_weights,
)
from dovetail.core.errors import ConfigError
from dovetail.core.model import PLAIN_FORMATS, ModelConfig
from dovetail.host.files import explaining, require_space
from dovetail.ops.memory import ELEMENTS, rounded
from dovetail.text.tokenizer import Tokenizer

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
    with explaining(directory, needed, "the model", _REMEDY), _making(directory):
        require_space(directory, needed, "the model", _REMEDY)
        write_weights(directory, plain_entries(checkpoint, dtype), shard_bytes)
        write_beside(checkpoint, tokenizer, directory)
        write_json(directory / "config.json", config)
        sync_directory(directory)
    return directory


def write_beside(checkpoint: Checkpoint, tokenizer: Tokenizer, directory: Path) -> None:
    """What stands beside weights and config.json: the tokenizer's files and generation_config.json."""
    _write_tokenizer(tokenizer, checkpoint.config, directory)
    generation = checkpoint.generation_config or _generation(checkpoint.config, tokenizer)
    write_json(directory / "generation_config.json", generation)


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


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    return checkpoint.architecture.tensors(checkpoint.config)


def plain_entries(checkpoint: Checkpoint, dtype: str) -> Iterator[Entry]:
    """Every tensor in one plain type."""
    for name, shape in _tensors(checkpoint):
        size = math.prod(shape) * ELEMENTS[dtype].itemsize
        yield Entry(name, _PLAIN[dtype], shape, size, partial(_values, checkpoint, name, dtype))


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
            sync_directory(made)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(made, directory)
    return directory


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=False))
    if set(tokenizer.templates) == {"default"}:
        write_text(directory / "chat_template.jinja", tokenizer.templates["default"])
    write_json(directory / "tokenizer_config.json", tokenizer_settings(tokenizer, config))


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
