"""What executors ask of a model. `models.decoder.Decoder` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from dovetail.core.model import ModelConfig
from dovetail.core.seams import Geometry
from dovetail.runtime.batch import Batch
from dovetail.runtime.kv import KV
from dovetail.runtime.target import Target

if TYPE_CHECKING:
    from torch import Tensor


class Stage(Protocol):
    """A callable of the program: hidden rows [rows, width] to hidden rows, and the rows' batch."""

    def __call__(self, hidden: Tensor, batch: Batch, kv: KV) -> Tensor: ...

    def record(self, to: Target, cut: Callable[[int], None]) -> None:
        """The same as operations. `cut` is told of each layer after which rows may be dropped."""


class Model(Protocol):
    """Embedding, a program of stages, head. Tied models name one stage several times."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def program(self) -> Sequence[Stage]: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, width]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, width] -> [rows, vocabulary] in float32, or float64 for a float64 model."""

    def record_start(self, to: Target) -> None:
        """What comes before every stage: hidden rows from tokens, and angles."""

    def record_head(self, to: Target) -> int:
        """The buffer of logits of the rows to sample from."""
