"""Formats made while weights are loaded: every linear layer of the blocks is rounded to the nearest codes (RTN).

They need no data, so a bf16 checkpoint can be tried in any of them at once. `dovetail quantize` writes better ones
of the same formats: with GPTQ and calibration text. "Give Me BF16 or Give Me Death?" (Kurtic et al., ACL 2025,
2411.02355) compares w8a8-fp8 (RTN, as here), w8a8-int8 and w4a16.
"""

from __future__ import annotations

from dataclasses import replace

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Seams, Site
from dovetail.core.technique import Technique
from dovetail.layers.loader import Recoding
from dovetail.ops.schemes import SCHEMES, Scheme

GROUPS = (32, 64, 128)
HEADS = ("asis", "int8")  # the output head: as the checkpoint has it, or int8 per channel


def w8a8_fp8(head: str = "asis") -> Technique:
    """e4m3 weights with a scale per output channel, e4m3 activations with a scale per token."""
    return _technique(SCHEMES["w8a8-fp8"], {"head": head})


def w8a8_int8(head: str = "asis") -> Technique:
    """int8 weights with a scale per output channel, int8 activations with a scale per token."""
    return _technique(SCHEMES["w8a8-int8"], {"head": head})


def w4a16(group: int = 128, head: str = "asis") -> Technique:
    """4-bit weights with a scale for each `group` input columns (32, 64 or 128), 16-bit activations."""
    return _technique(SCHEMES["w4a16"], {"group": group, "head": head})


def w4a8(group: int = 128, head: str = "asis") -> Technique:
    """4-bit weights with a scale for each `group` input columns, int8 activations with a scale per token."""
    return _technique(SCHEMES["w4a8"], {"group": group, "head": head})


def _technique(scheme: Scheme, options: dict[str, object]) -> Technique:
    group, head = options.get("group"), options["head"]
    if group is not None and group not in GROUPS:
        raise ConfigError(f"{scheme.name}: group must be 32, 64 or 128, got {group}")
    if head not in HEADS:
        raise ConfigError(f"{scheme.name}: head must be asis or int8, got '{head}'")
    chosen = replace(scheme, group=group) if isinstance(group, int) else scheme

    def build(site: Site) -> dict[str, object]:
        return {"format": Recoding(chosen.nearest, SCHEMES["w8a8-int8"].nearest if head == "int8" else None)}

    return Technique(
        name=scheme.name,
        fills=("format",),
        build=build,
        options=options,
        needs=frozenset({"weights that are not quantized"}),
        activity=_activity,
    )


def _activity(seams: Seams) -> int:
    return seams.format.products if isinstance(seams.format, Recoding) else 0
