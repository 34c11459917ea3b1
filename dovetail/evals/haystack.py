"""The context of a needle test: text of an exact number of tokens, with needles at given depths."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.text.tokenizer import Tokenizer

STOPS = (".", "!", "?")  # end a sentence where a space follows
BREAKS = ("\n", "。", "！", "？")
NEAR = 64  # a needle moves by at most so many tokens to stand between two sentences


@dataclass(frozen=True)
class Haystack:
    """The `tokens` of a text, read in a circle, and `starts`: where lines and sentences begin, and the text's
    end."""

    tokens: list[int]
    starts: list[int]

    def place(self, begin: int, size: int, depth: float) -> int:
        """The place at `depth` percent of the `size` tokens from token `begin` on: the nearest start of a line or
        sentence, or exactly there if none is within NEAR tokens."""
        wanted = round(size * depth / 100)
        here = (begin + wanted) % len(self.tokens)
        i = bisect_right(self.starts, here)
        near = [size, *(wanted + start - here for start in self.starts[i - 1 : i + 1])]
        best = min((p for p in near if 0 <= p <= size), key=lambda p: abs(p - wanted))
        return best if abs(best - wanted) <= NEAR else wanted

    def hide(self, begin: int, size: int, needles: Sequence[tuple[float, list[int]]]) -> list[int]:
        """`size` tokens of the text from token `begin` on, with each of `needles`, (depth in percent, tokens), put
        in at its place. Needles at the same place keep their order."""
        places = sorted((self.place(begin, size, depth), i) for i, (depth, _) in enumerate(needles))
        found, at = [], 0
        for place, i in places:
            found += [self._token(begin + j) for j in range(at, place)] + needles[i][1]
            at = place
        return found + [self._token(begin + j) for j in range(at, size)]

    def _token(self, i: int) -> int:
        return self.tokens[i % len(self.tokens)]


def haystack(text: str, name: str, tokenizer: Tokenizer) -> Haystack:
    """The haystack of a text. ConfigError where the text is empty."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise ConfigError(f"corpus {name} is empty")
    return Haystack(tokens, [0, *_starts(tokens, tokenizer), len(tokens)])


def _starts(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[int]:
    """The tokens at which a line or a sentence begins. A character of several tokens is never cut."""
    pieces = tokenizer.detokenizer(skip_special_tokens=False)
    before = ""
    for i, token in enumerate(tokens):
        piece = pieces.push(token)
        if i and (before.endswith(BREAKS) or (before.endswith(STOPS) and piece[:1].isspace())):
            yield i
        before = piece
