"""Settings that are worth trying for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.build import stored_format
from dovetail.config import resolve_activations
from dovetail.core.errors import ConfigError
from dovetail.core.model import PLAIN_FORMATS, ModelConfig
from dovetail.options import Options
from dovetail.runtime.store import KV_DTYPES
from dovetail.setting import Setting, parse_sweep
from dovetail.techniques import MODULES, technique

if TYPE_CHECKING:
    from dovetail.checkpoint import Checkpoint

ACTIVATIONS = ("exact", "int16", "int8")  # of products with quantized weights, the least rounded first
KV = tuple(kind for kind in ("fp8", "int8") if kind in KV_DTYPES)
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Candidate:
    """A model with a setting. The `name` tells it from the others."""

    name: str
    model: str
    setting: Setting


def candidates(
    model: str, checkpoint: Checkpoint, base: Setting, sweep: Sequence[str], also: Sequence[Path]
) -> list[Candidate]:
    """What to compare, the least rounded first: `sweep` or what suits the checkpoint, and the models in `also`.

    ConfigError for a setting that cannot be parsed, an unknown technique, and names that are given twice.
    """
    texts = sweep or list(_suiting(checkpoint))
    first = next(iter(_suiting(checkpoint)))
    parsed = {setting.name: setting for text in (first, *texts) for setting in parse_sweep(text, base)}
    for spec in (spec for setting in parsed.values() for spec in setting.use):
        technique(spec)  # what is not known is an error, and no setting that cannot run here
    found = [Candidate(setting.name, model, setting) for setting in parsed.values()]
    for path in also:
        name = path.expanduser().resolve().name
        if any(candidate.name == name for candidate in found):
            raise ConfigError(f"--also {path}: '{name}' is the name of another setting; rename the folder")
        found.append(Candidate(name, str(path), base))
    return found


def _suiting(checkpoint: Checkpoint) -> Iterator[str]:
    """Texts of settings for a checkpoint, the least rounded first."""
    stored = stored_format(checkpoint)
    if stored not in PLAIN_FORMATS:
        kinds = [kind for kind in ACTIVATIONS if _known(kind, stored)]
        yield from (f"activations={kind}" for kind in kinds)
        yield from (f"activations={kinds[-1]}+kv-cache-dtype={kind}" for kind in KV)
        return
    yield "plain"
    for name in (n for n, module in MODULES.items() if module.startswith("rounded.")):  # those that round weights
        options = technique(name).options
        group = _group(checkpoint.config) if "group" in options else None
        yield name if group in (None, options.get("group")) else f"{name}:group={group}"
    yield from (f"kv-cache-dtype={kind}" for kind in KV)


def _known(activations: str, stored: str) -> bool:
    """Whether this version has such activations; whether they can run here is seen when they are loaded."""
    try:
        resolve_activations(Options(activations=activations), stored, "native")
    except ConfigError:
        return False
    return True


def _group(config: ModelConfig) -> int | None:
    """The largest group of columns that divides the width of every linear layer; None if none does."""
    widths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    return next((group for group in GROUPS if not any(width % group for width in widths)), None)
