"""The standard low-precision formats by name, and plain rounding to the nearest of their codes.

"Give Me BF16 or Give Me Death?" (Kurtic et al., ACL 2025, 2411.02355), section 3, compares three of them; "w4a8"
is 4-bit weights with 8-bit activations. Scales are those of the compressed-tensors library: the largest magnitude
of a row or group over 7.5, 127.5 or 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.ops.grids import to_e4m3, to_nibbles
from dovetail.ops.memory import from_bfloat16, to_bfloat16
from dovetail.ops.stored import StoredTensor

LARGEST = {"I4": 7.5, "I8": 127.5, "F8": 448.0}  # codes' magnitude to which a row's or group's largest value goes


@dataclass(frozen=True)
class Scheme:
    """format: of `ops.grids`. group: columns that share a scale, 0 for whole rows. activation: of
    `ops.grids.ACTIVATIONS`."""

    name: str
    format: str
    activation: str
    group: int = 0

    def scales(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [N, groups] for weight [N, K]; 1 where all values are zero.

        ConfigError if K is no multiple of the group.
        """
        n, k = weight.shape
        if k % (self.group or k):
            fitting = " or ".join(str(g) for g in (128, 64, 32) if k % g == 0) or "another size"
            raise ConfigError(
                f"{self.name}: a layer has {k} input columns, which groups of {self.group} do not divide; use a "
                f"group of {fitting}"
            )
        largest = np.abs(weight).reshape(n, k // (self.group or k), -1).max(-1) / np.float32(LARGEST[self.format])
        return np.where(largest > 0, largest, np.float32(1)).astype(np.float32)

    def codes(self, weight: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[Any]:
        """The nearest codes [N, K] (int8; e4m3 as uint8) of weight [N, K] with scales [N, groups]."""
        n, k = weight.shape
        scaled = (weight.reshape(n, scales.shape[1], -1) / scales[..., None]).reshape(n, k)
        if self.format == "F8":
            return to_e4m3(scaled)
        low, high = (-8, 7) if self.format == "I4" else (-128, 127)
        return np.clip(np.rint(scaled), low, high).astype(np.int8)

    def stored(self, name: str, codes: NDArray[Any], scales: NDArray[np.float32]) -> StoredTensor:
        """codes [N, K] with scales [N, groups] as a weight of this scheme."""
        data = to_nibbles(codes) if self.format == "I4" else codes.view(np.uint8)
        return StoredTensor(name, self.format, codes.shape, data, {"scale": scales}, activation=self.activation)

    def nearest(self, weight: StoredTensor) -> StoredTensor:
        """A weight [N, K] rounded to the nearest codes (RTN), with scales in bfloat16."""
        values = weight.values()
        scales = bfloat16(self.scales(values))
        return self.stored(weight.name, self.codes(values, scales), scales)


def bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 values rounded to bfloat16 (ties to even), in float32."""
    return from_bfloat16(to_bfloat16(x))


SCHEMES = {
    s.name: s
    for s in (
        Scheme("w8a8-fp8", "F8", "fp8-token"),
        Scheme("w8a8-int8", "I8", "int8-token"),
        Scheme("w4a16", "I4", "int16", 128),
        Scheme("w4a8", "I4", "int8-token", 128),
    )
}
