"""Dovetail: an LLM inference engine that touches only the bytes that matter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: `import dovetail` and `dovetail --help` must not pay for torch.
_PUBLIC = {
    "LLM": "dovetail.llm",
    "SamplingParams": "dovetail.core.sampling",
    "RequestOutput": "dovetail.outputs",
    "CompletionOutput": "dovetail.outputs",
    "DovetailError": "dovetail.core.errors",
    "ModelError": "dovetail.core.errors",
    "ConfigError": "dovetail.core.errors",
    "RequestError": "dovetail.core.errors",
    "CapacityError": "dovetail.core.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_PUBLIC])
