"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.bench.kernels.attention import GROUPED, Heads
from dovetail.reproduce import MODEL
from dovetail.reproduce.needles import Needles

MIB = 1 << 20
KIB = 1 << 10

_NEEDLES = Needles(MODEL, "2048,4096", "10,50,90", 3)


@dataclass(frozen=True)
class Effort:
    """Attention alone. contexts: tokens behind which it reads `attention_budget`. rounds: of each comparison.
    cold: the fewest bytes of KV that a timed run goes through.

    The whole engine with `model`. decode_context, decode_budget, decode_rounds: its setting. It generates
    `new_tokens` tokens in every round, `skip_layers` layers read everything, and pages are chosen by `score`.
    needles: the grid at that setting.
    """

    rounds: int
    contexts: tuple[int, ...]
    decode_rounds: int
    new_tokens: int
    attention_budget: int = 2048
    cold: int = 513 * MIB
    heads: Heads = GROUPED[1]
    decode_context: int = 7552
    decode_budget: int = 512
    skip_layers: int = 2
    score: str = "codes"
    model: str = MODEL
    needles: Needles = _NEEDLES

    @property
    def use(self) -> str:
        """The technique as it decodes and finds needles."""
        return f"quest:budget={self.decode_budget},skip_layers={self.skip_layers},score={self.score}"


_CONTEXTS = (8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB)
EFFORTS = {
    "quick": Effort(15, _CONTEXTS[2:3], 8, 24, needles=Needles(MODEL, "2048", "10,90", 2)),
    "default": Effort(31, _CONTEXTS, 20, 32),
    "full": Effort(61, _CONTEXTS, 40, 64, needles=Needles(MODEL, "1024,2048,4096,7424", "10,30,50,70,90", 5)),
}
