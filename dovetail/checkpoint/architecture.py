"""The record of one model architecture: everything that a reader of checkpoints must know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.geometry import check_geometry, extended, known_ids
from dovetail.checkpoint.layout import BLOCK_NAMES, decoder_tensors
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig

if TYPE_CHECKING:
    from dovetail.checkpoint.gguf import GGUFFile


@dataclass(frozen=True)
class Architecture:
    """One model architecture: how its files are read, written back, and run.

    name: its name in GGUF's general.architecture and in `ModelConfig.architecture`.
    hf_class, hf_type: `architectures` and `model_type` in config.json; hf_type "" means the name.
    from_hf, from_gguf: read the config of a file. Whether its numbers agree is checked afterwards.
    to_hf: makes config.json's object, without architectures, model_type and the number format.
    program: makes the model that runs from a loader, a row filter and a variant.
    tensors: (name, shape) of every tensor, embedding first, in the order in which a forward pass needs them.
    gguf_names: the part of a GGUF tensor's name behind `blk.0.` -> of the Hugging Face name behind
    `model.layers.0.`.
    interleaved: whether GGUF writers reorder rows of q and k, so that neighbours are rotated together.
    norm_offset: what Hugging Face files subtract from the weights of norms. It is added when they are read.
    """

    name: str
    hf_class: str
    from_hf: Callable[[Fields], ModelConfig]
    from_gguf: Callable[[Keys], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    program: Callable[..., Any]
    hf_type: str = ""
    tensors: Callable[[ModelConfig], Iterator[tuple[str, tuple[int, ...]]]] = decoder_tensors
    gguf_names: Mapping[str, str] = field(default_factory=lambda: BLOCK_NAMES)
    interleaved: bool = False
    norm_offset: float = 0.0

    @property
    def model_type(self) -> str:
        return self.hf_type or self.name


Architectures = Mapping[str, Architecture]  # by name


def read_hf_config(
    values: Mapping[str, Any], source: str, known: Architectures, generation: Fields | None = None
) -> tuple[Architecture, ModelConfig]:
    """Read config.json's object. The ends in `generation` (generation_config.json) are added to the config's own.

    ModelError naming `source` and the field for an unknown architecture, a missing or wrongly typed field, or
    numbers that contradict each other.
    """
    if isinstance(values.get("text_config"), dict):
        kind = str(values.get("model_type"))[:64]
        raise ModelError(f"{source}: model_type {kind!r} holds more than text (text_config); only text can be run")
    types = {record.model_type: record for record in known.values()}
    record = _find(values.get("model_type"), types, f"{source}: model_type")
    config = extended(check_geometry(record.from_hf(Fields(dict(values), source)), source))
    if generation is not None:
        ends = generation.token_ids("eos_token_id")
        ends = config.eos_token_ids + known_ids(ends, "eos_token_id", generation.source, config.vocab_size)
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(ends)))
    return record, config


def read_gguf_config(file: GGUFFile, known: Architectures) -> tuple[Architecture, ModelConfig]:
    """The model that `file` describes. ModelError naming the file and the key for anything missing, wrong or
    contradictory, and for an unknown architecture."""
    name = file.metadata.read("general.architecture", str)
    record = _find(name, known, f"{file.path}: general.architecture")
    return record, extended(check_geometry(record.from_gguf(Keys(file, record.name)), str(file.path)))


def _find(name: Any, known: Architectures, source: str) -> Architecture:
    if isinstance(name, str) and name in known:
        return known[name]
    raise ModelError(f"{source}: architecture {str(name)[:64]!r} is not known; known are {', '.join(known)}")
