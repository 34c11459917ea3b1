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
        self.error: str | None = None
        self._start = start
        self._complete = vocabulary.complete
        self._ends = np.zeros(vocabulary.words, np.uint32)
        for token in ends:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._tokens: list[int] = []  # those that the answer has
        self._parser: LLMatcher | None = None

    def allowed(self, drafts: Sequence[int]) -> int:
        if self.error is not None or not drafts:
            return 0
        return self._ready().validate_tokens(list(drafts))

    def masks(self, drafts: Sequence[int]) -> NDArray[np.uint32]:
        out = np.zeros((1 + len(drafts), len(self._ends)), np.uint32)
        if self.error is not None:
            return out
        parser, taken = self._ready(), 0
        try:
            while (reason := self._mask(parser, out[taken])) is None and taken < len(drafts):
                if not parser.consume_token(drafts[taken]):
                    reason = "a draft that was allowed does not fit"
                    break
                taken += 1
        finally:
            if taken and not parser.rollback(taken):
                self._parser = None  # what is wrong lies behind the drafts; they may be wrong as well
        if reason is not None and taken == 0:
            self.error = reason
        return out

    def commit(self, token: int) -> bool:
        parser = self._ready()
        if self.error is None and not parser.consume_token(token):
            self.error = _why(parser)
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
            if self._tokens and not self._parser.consume_tokens(self._tokens):
                self.error = _why(self._parser)
        return self._parser


def _why(parser: LLMatcher) -> str:
    """What a parser has to say about its end."""
    said = [*parser.get_error().strip().splitlines(), ""][0]
    if said == DEAD_END:
        return "no token of the vocabulary continues an answer of the requested form"
    return f"the form of the answer cannot be followed: {said[:200]}"
