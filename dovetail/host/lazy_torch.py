"""torch, imported when it is first used.

Reference operations are written in torch, beside the native ones that they define. The native path uses none of
them, so the package runs without torch, and does not import it where it is installed.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of NVIDIA's driver, on Linux and in WSL
INSTALL = 'pip install "dovetail-llm[torch]"'


def installed() -> bool:
    """Whether torch can be found. It is not imported."""
    spec = find_spec("torch")
    return spec is not None and spec.origin is not None  # a folder that was left behind has none


def _load() -> Any:
    try:
        module = import_module("torch")
        module.Tensor  # noqa: B018  a folder that was left behind has none
        return module
    except Exception as error:  # a broken installation fails in many ways
        if not installed():
            raise ConfigError(f"this needs torch, which is not installed: {INSTALL}") from error
        what = f"torch is installed but does not load ({type(error).__name__}: {error})"
        raise ConfigError(f"{what}; install it again: {INSTALL}") from error


def cuda_devices() -> int:
    """How many CUDA devices torch sees. It is imported only where the driver's files are.

    If it does not load, that is a warning, because the CPU needs none of it.
    """
    if not installed() or not any(os.path.exists(f) for f in DRIVERS):
        return 0
    try:
        return int(_load().cuda.device_count())
    except ConfigError as error:
        warnings.warn(f"the GPU is left alone: {error}", stacklevel=2)
        return 0


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
