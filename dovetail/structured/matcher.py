"""One answer on its way through a grammar: which tokens may come next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from dovetail.structured.vocabulary import Vocabulary

DEAD_END = "NoExtensionBias"  # how the error begins when no token can follow


class Matcher:
    """The `core.structured.Constraint` of an answer. Where the grammar is complete, `ends` may come too.

    start: the parser before the first token. It is copied when it is first needed, so answers that wait cost
    nothing.
    """

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary, ends: Collection[int]) -> None:
        self._start = start
        self._complete = vocabulary.complete
        self._ends = np.zeros(vocabulary.words, np.uint32)
        for token in ends:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._tokens: list[int] = []  # those that the answer has
        self._parser: LLMatcher | None = None
        self._failed: tuple[list[int], str] | None = None  # after which tokens there was no way on, and why

    @property
    def error(self) -> str | None:
        if self._failed is None:
            return None
        tokens, why = self._failed
        return why if self._tokens[: len(tokens)] == tokens else None

    def drafts(self, guesses: list[int]) -> list[int]:
        if self.error is not None:
            return []
        parser = self._ready()
        forced = parser.compute_ff_tokens()
        if forced and forced != guesses[: len(forced)]:
            return forced
        return guesses[: parser.validate_tokens(guesses)] if guesses else []

    def masks(self, drafts: Sequence[int]) -> NDArray[np.uint32]:
        out = np.zeros((1 + len(drafts), len(self._ends)), np.uint32)
        if self.error is not None:
            return out
        parser, taken = self._ready(), 0
        try:
            while (why := self._mask(parser, out[taken])) is None and taken < len(drafts):
                if not parser.consume_token(drafts[taken]):
                    why = _why(parser)
                    break
                taken += 1
        finally:
            if taken and not parser.rollback(taken):
                self._parser = None
        if why is not None:  # behind drafts it is an error only if they are right
            self._failed = [*self._tokens, *drafts[:taken]], why
        return out

    def commit(self, token: int) -> bool:
        parser = self._ready()
        if not parser.consume_token(token):
            self._failed = list(self._tokens), _why(parser)
        self._tokens.append(token)
        return self.error is None and parser.is_stopped()

    def _mask(self, parser: LLMatcher, out: NDArray[np.uint32]) -> str | None:
        """Write which tokens may follow. Returns why none can be named, if so."""
        parser.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        if parser.is_error():
            out[:] = 0
            return _why(parser)
        word, bit = divmod(self._complete, 32)
        if out[word] >> np.uint32(bit) & np.uint32(1):
            out[word] ^= np.uint32(1 << bit)
            out |= self._ends
        return None

    def _ready(self) -> LLMatcher:
        if self._parser is None:
            self._parser = self._start.deep_copy()
            self._parser.consume_tokens(self._tokens)
        return self._parser


def _why(parser: LLMatcher) -> str:
    """What a parser has to say about its end."""
    said = [*parser.get_error().strip().splitlines(), ""][0]
    if said == DEAD_END:
        return "no token of the vocabulary continues an answer of the requested form"
    return f"the form of the answer cannot be followed: {said[:200]}"
