"""Dovetail: an LLM inference engine that touches only the bytes that matter.

`from dovetail import LLM, SamplingParams` is the Python API. Names are loaded when they are first used, so
that importing the package is cheap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Before anybody imports torch: its threads must not spin on the cores on which the native ones compute.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["OMP_WAIT_POLICY"] = "passive"

if TYPE_CHECKING:
    from dovetail.core.errors import (
        CapacityError,
        ConfigError,
        DovetailError,
        ForkError,
        ModelError,
        RequestError,
    )
    from dovetail.core.sampling import SamplingParams
    from dovetail.core.structured import StructuredOutputs
    from dovetail.core.technique import Technique
    from dovetail.core.types import Probe
    from dovetail.llm import LLM
    from dovetail.outputs import CompletionOutput, RequestOutput

_WHERE = {
    "LLM": "dovetail.llm",
    "SamplingParams": "dovetail.core.sampling",
    "StructuredOutputs": "dovetail.core.structured",
    "Technique": "dovetail.core.technique",
    "Probe": "dovetail.core.types",
    "RequestOutput": "dovetail.outputs",
    "CompletionOutput": "dovetail.outputs",
    "DovetailError": "dovetail.core.errors",
    "ModelError": "dovetail.core.errors",
    "ConfigError": "dovetail.core.errors",
    "RequestError": "dovetail.core.errors",
    "CapacityError": "dovetail.core.errors",
    "ForkError": "dovetail.core.errors",
}

__all__ = [
    "LLM",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "DovetailError",
    "ForkError",
    "ModelError",
    "Probe",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "Technique",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'dovetail' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
