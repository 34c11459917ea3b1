"""torch, imported when it is first used.

Reference operations are written in torch, beside the native ones that they define. The native path uses none of
them, so the package runs without torch, and does not import it where it is installed.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of NVIDIA's driver, on Linux and in WSL
INSTALL = 'pip install "dovetail-llm[torch]"'


def installed() -> bool:
    """Whether torch can be found. It is not imported."""
    return find_spec("torch") is not None


def _load() -> Any:
    try:
        return import_module("torch")
    except ImportError as error:
        if installed():
            raise ConfigError(
                f"torch is installed but does not load ({error}); reinstall it: {INSTALL}"
            ) from error
        raise ConfigError(f"this needs torch, which is not installed: {INSTALL}") from error


def cuda_devices() -> int:
    """How many CUDA devices torch sees. It is imported only where the driver's files are."""
    if not installed() or not any(os.path.exists(f) for f in DRIVERS):
        return 0
    return int(_load().cuda.device_count())


class _Torch:
    """The module torch, whose attributes are looked up on first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(_load(), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _Torch()
