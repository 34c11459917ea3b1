"""One trial of a needle test: a retrieval task and a place in a haystack, asked at any length and depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Probe
from dovetail.evals.haystack import Haystack
from dovetail.evals.retrieval import Retrieval, retrieval

if TYPE_CHECKING:
    from dovetail.llm import LLM
    from dovetail.outputs import RequestOutput
    from dovetail.text.tokenizer import Tokenizer

SPARE = 8  # tokens of answer for each number besides it: too few to go on to the number of another key


@dataclass(frozen=True)
class Trial:
    """`task` in tokens, in a text that begins at token `begin` of `hay`. `depths` are those of the needles after
    the first, in percent."""

    task: Retrieval
    tokenizer: Tokenizer
    hay: Haystack
    begin: int
    depths: tuple[float, ...]

    @cached_property
    def head(self) -> list[int]:
        """What the model wants before every text."""
        return [t for t in self.tokenizer.encode("")[:1] if t == self.tokenizer.bos_id]

    @cached_property
    def needles(self) -> list[list[int]]:
        return [self._tokens(text) for text in self.task.needles]

    @cached_property
    def question(self) -> list[int]:
        return self._tokens(self.task.question)

    @cached_property
    def room(self) -> int:
        """Tokens of an answer."""
        return sum(len(self._tokens(f" {value},")) + SPARE for value in self.task.values)

    @property
    def fixed(self) -> int:
        """Tokens of a prompt that are not text of the haystack."""
        return len(self.head) + sum(map(len, self.needles)) + len(self.question)

    def context(self, length: int, depth: float) -> list[int]:
        """Tokens before the question, where both together are `length`."""
        depths = (depth, *self.depths)
        needles = list(zip(depths, self.needles, strict=True))
        return self.head + self.hay.hide(self.begin, length - self.fixed, needles)

    def run(self, llm: LLM, length: int, depths: list[int]) -> Iterator[tuple[int, RequestOutput]]:
        """Depth and answer for each of `depths`. RequestError where the engine gave none."""
        contexts = [self.context(length, depth) for depth in depths]
        params = SamplingParams(temperature=0, max_tokens=self.room)
        probes = [Probe(dense_until=len(c)) for c in contexts]
        outputs = llm.generate([c + self.question for c in contexts], params, probes=probes, progress=False)
        for depth, output in zip(depths, outputs, strict=True):
            if output.error:
                raise RequestError(f"{length} tokens with a needle at {depth}% were not answered: {output.error}")
            yield depth, output

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def trial(kind: tuple[str, int], llm: LLM, hay: Haystack, number: int) -> Trial:
    """Trial `number` of a `kind`, variant and number of needles, which the engine's seed decides."""
    random = Random(f"{llm.config.seed}/{number}")
    task = retrieval(*kind, random)
    begin = random.choice(hay.starts[:-1])
    return Trial(task, llm.tokenizer, hay, begin, tuple(random.uniform(0, 100) for _ in task.needles[1:]))
