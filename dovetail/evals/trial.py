"""One trial of a needle test: a retrieval task in a haystack, which can be asked at any length and depth."""

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

SPARE = 8  # tokens of answer for each number beyond its own: too few to go on to another key's number


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
        """Tokens that the model needs before every text."""
        return [t for t in self.tokenizer.encode("")[:1] if t == self.tokenizer.bos_id]

    @cached_property
    def needles(self) -> list[list[int]]:
        return [self._tokens(text) for text in self.task.needles]

    @cached_property
    def question(self) -> list[int]:
        return self._tokens(self.task.question)

    @cached_property
    def room(self) -> int:
        """The most tokens of an answer."""
        return sum(len(self._tokens(f" {value},")) + SPARE for value in self.task.values)

    @property
    def fixed(self) -> int:
        """Tokens of a prompt that are not text of the haystack."""
        return len(self.head) + sum(map(len, self.needles)) + len(self.question)

    def context(self, length: int, depth: float) -> list[int]:
        """The context before the question. Both together have `length` tokens."""
        depths = (depth, *self.depths)
        needles = list(zip(depths, self.needles, strict=True))
        return self.head + self.hay.hide(self.begin, length - self.fixed, needles)

    def run(self, llm: LLM, length: int, depths: list[int]) -> Iterator[tuple[int, RequestOutput]]:
        """The depth and the answer for each of `depths`. RequestError if the engine gave no answer."""
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
    """Trial `number`. kind: the variant and the number of needles. The engine's seed decides everything random."""
    random = Random(f"{llm.config.seed}/{number}")
    task = retrieval(*kind, random)
    begin = random.choice(hay.starts[:-1])
    return Trial(task, llm.tokenizer, hay, begin, tuple(random.uniform(0, 100) for _ in task.needles[1:]))
