"""The recipe of a quantized checkpoint: everything on which its bytes depend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from dovetail import __version__
from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.identity import identity
from dovetail.checkpoint.own_format import COLUMNS, GROUPS
from dovetail.core.errors import ConfigError
from dovetail.core.model import ModelConfig
from dovetail.host.lazy_torch import torch
from dovetail.text.corpus import Corpus

# The options of each format, and what they are by default. None: depends on the model or the format.
TEXT = {"samples": 128, "length": 512}
GPTQ = {"method": "gptq", "damping": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
    "w8a8-fp8": {},
    "w8a8-int8": {**GPTQ, "observer": "minmax", "smoothquant": 0.0, **TEXT},
    "w4a16": {**GPTQ, "observer": "mse", "group": 128, **TEXT},
    "w4a8": {**GPTQ, "observer": "mse", "group": 128, **TEXT},
    "atom": {**GPTQ, "group": 128, "outliers": None, "activation_clip": 0.9, "weight_clip": 0.85, **TEXT},
    "tender": {"bits": 8, "groups": 8, "chunk": 256, "rounding": "up", "samples": 32, "length": 2048},
}
COMMON = {"head": "asis", "dtype": "bfloat16"}
CHOICES = {
    "method": ("gptq", "rtn"),
    "observer": ("mse", "minmax"),
    "group": GROUPS,
    "bits": (8, 4),
    "rounding": ("up", "down"),
    "head": ("asis", "int8"),
    "dtype": ("bfloat16", "float32"),
}
RANGES = {
    "damping": (0.0, 1.0), "smoothquant": (0.0, 1.0), "activation_clip": (0.1, 1.0), "weight_clip": (0.1, 1.0),
    "samples": (1, 1 << 20), "length": (16, 1 << 20), "outliers": (0, 1 << 16), "groups": (1, 20),
    "chunk": (16, 1 << 20),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """format: a key of OPTIONS. options: all of them. text: for calibration; None where none is needed."""

    format: str
    options: Mapping[str, Any]
    text: Corpus | None
    seed: int

    def object(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What is kept in the checkpoint. Equal objects give equal bytes."""
        made: dict[str, Any] = {"format": self.format, "options": dict(self.options), "seed": self.seed}
        if self.text is not None:
            digest = hashlib.sha256(self.text.text.encode("utf-8", "surrogatepass")).hexdigest()
            made["calibration"] = {"text": self.text.name, "sha256": digest}
        made["model"] = identity(checkpoint)
        made["versions"] = {"dovetail": __version__, "torch": version("torch"), "numpy": np.__version__}
        # Sums of floating numbers depend on how they are cut.
        made["machine"] = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
        return made


def needs_text(form: str, options: Mapping[str, Any]) -> bool:
    """Whether anything is measured on text."""
    return form in ("atom", "tender") or options.get("method") == "gptq" or bool(options.get("smoothquant"))


def resolved(form: str, given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """All options of a format: those that were given, and the defaults of the others.

    ConfigError for a format that is not known, an option that it does not take, a value out of range, and a group
    that does not divide the width of a layer.
    """
    if form not in OPTIONS:
        raise ConfigError(f"format '{form}' is unknown; the known ones are {', '.join(OPTIONS)}")
    known = {**OPTIONS[form], **COMMON}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name not in known:
            takers = [f for f in OPTIONS if name in OPTIONS[f]]
            raise ConfigError(f"{form} takes no {flag}; it is an option of {', '.join(takers)}")
        choices = (*GROUPS, 0) if (form, name) == ("atom", "group") else CHOICES.get(name)
        if choices is not None and value not in choices:
            raise ConfigError(f"{flag} must be {' or '.join(map(str, choices))}, got {value}")
        low, high = RANGES.get(name, (value, value))
        if not low <= value <= high:
            raise ConfigError(f"{flag} must be from {low} to {high}, got {value}")
    options = known | dict(given)
    if form == "atom":
        options["outliers"] = _outliers(options, given, config)
    elif "group" in options:
        for name, width in widths(config).items():
            if width % options["group"]:
                raise ConfigError(
                    f"{form}: layer {name} has {width} inputs, which groups of {options['group']} do not divide; "
                    f"{_fitting(list(widths(config).values()))}"
                )
    return options


def _fitting(sizes: list[int]) -> str:
    found = [str(g) for g in GROUPS if not any(size % g for size in sizes)]
    return f"give --group {' or '.join(found)}" if found else "no group of 128, 64 or 32 divides all of them"


def widths(config: ModelConfig) -> dict[str, int]:
    """Inputs of the linear layers of a block, by their names in the first one."""
    hidden = config.hidden_size
    return {
        "model.layers.0.self_attn.q_proj": hidden,
        "model.layers.0.self_attn.o_proj": config.num_heads * config.head_dim,
        "model.layers.0.mlp.gate_proj": hidden,
        "model.layers.0.mlp.down_proj": config.intermediate_size,
    }


def _outliers(options: Mapping[str, Any], given: Mapping[str, Any], config: ModelConfig) -> dict[str, int]:
    """Outlier channels by the inputs of a layer: as many as asked, or 128 for a width of 4096 and in proportion,
    and more where groups must divide the others (without groups, what kernels multiply at once)."""
    group, asked = options["group"] or COLUMNS, given.get("outliers")
    least = asked if asked is not None else max(1, 128 * config.hidden_size // 4096)
    found = {}
    for name, width in widths(config).items():
        count = least + (width - least) % group
        if (asked is not None and count != asked) or count % 2 or count >= width:
            fits = f"{count} would do" if count % 2 == 0 and count < width else "another --group may do"
            raise ConfigError(
                f"atom: layer {name} has {width} inputs; without {least} outliers groups of {group} do not divide "
                f"them; {fits}"
            )
        found[str(width)] = count
    return found
