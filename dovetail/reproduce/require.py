"""What a measurement needs to mean anything."""

from __future__ import annotations

from dovetail.bench.kernels.attention import Kernels
from dovetail.core.errors import ConfigError
from dovetail.core.technique import idle
from dovetail.host import machine
from dovetail.llm import LLM
from dovetail.ops import cpu


def native(system: str) -> Kernels:
    """The kernels that `system` is measured with. ConfigError if they were not built."""
    if not cpu.isas():
        raise ConfigError(f"reproducing {system} needs the native kernels, which were not built: `pip install .`")
    return Kernels(cpu.isas()[0], machine.cpu_budget())


def activity(llm: LLM) -> None:
    """RuntimeError if a technique in use never acted."""
    if names := idle(llm.activity()):
        raise RuntimeError(f"{', '.join(names)} did nothing: what was measured is the plain engine's")
