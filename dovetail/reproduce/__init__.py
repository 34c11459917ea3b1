"""Published claims beside what this engine does on this machine: a file for each paper (`dovetail reproduce`).

May import everything but cli. Importing this is cheap; a paper's own file may import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.core.errors import ConfigError

MODEL = "smollm2-135m"  # the model for claims about the whole engine


@dataclass(frozen=True)
class System:
    """A published system. `module` measures its claims; None if it is not built yet."""

    name: str
    title: str
    paper: str
    module: str | None = None

    @property
    def state(self) -> str:
        return "not built yet" if self.module is None else "available"


_SYSTEMS = (
    System(
        "flashinfer",
        "FlashInfer: an attention engine for serving",
        "arXiv 2501.01005, MLSys 2025",
        "dovetail.reproduce.flashinfer",
    ),
    System(
        "quest",
        "Quest: query-aware choice of KV pages",
        "arXiv 2406.10774, ICML 2024",
        "dovetail.reproduce.quest",
    ),
    System(
        "shadowkv",
        "ShadowKV: low-rank keys, values in slow memory",
        "arXiv 2410.21465, ICML 2025",
        "dovetail.reproduce.shadowkv",
    ),
    System(
        "infinigen",
        "InfiniGen: speculative fetching of KV",
        "arXiv 2406.19707, OSDI 2024",
        "dovetail.reproduce.infinigen",
    ),
    System(
        "atom",
        "Atom: 4-bit weights and activations",
        "arXiv 2310.19102, MLSys 2024",
        "dovetail.reproduce.atom",
    ),
    System(
        "tender",
        "Tender: decomposed activations, integer rescaling",
        "arXiv 2406.12930, ISCA 2024",
        "dovetail.reproduce.tender",
    ),
    System(
        "bf16",
        "Give Me BF16 or Give Me Death: formats compared",
        "arXiv 2411.02355, ACL 2025",
        "dovetail.reproduce.bf16",
    ),
    System("fiddler", "Fiddler: experts on CPU and GPU", "arXiv 2402.07033, ICLR 2025"),
    System("monde", "MoNDE: experts near memory", "arXiv 2405.18832, DAC 2024"),
    System("duplex", "Duplex: a device with two kinds of units", "arXiv 2409.01141, MICRO 2024"),
    System("blendserve", "BlendServe: offline batches by resource", "arXiv 2411.16102, ASPLOS 2026"),
    System(
        "smartspec",
        "SmartSpec: speculation by goodput",
        "arXiv 2406.14066",
        "dovetail.reproduce.smartspec",
    ),
    System("cachecraft", "Cache-Craft: KV of chunks reused anywhere", "arXiv 2502.15734, SIGMOD 2025"),
    System("kvshare", "KVShare: KV of similar prompts", "arXiv 2503.16525"),
    System("recursive", "Relaxed Recursive Transformers: tied layers", "arXiv 2410.20672, ICLR 2025"),
    System("hasco", "HASCO: hardware and software designed together", "arXiv 2105.01585, ISCA 2021"),
)

SYSTEMS = {system.name: system for system in _SYSTEMS}


def system(name: str) -> System:
    """The system `name`. ConfigError for an unknown one, and for one that is not built yet."""
    if name not in SYSTEMS:
        raise ConfigError(f"there is no system '{name}'; the known ones are {', '.join(SYSTEMS)}")
    found = SYSTEMS[name]
    if found.module is None:
        ready = ", ".join(s.name for s in _SYSTEMS if s.module is not None)
        raise ConfigError(f"{name} ({found.paper}) is not built yet; available: {ready}")
    return found
