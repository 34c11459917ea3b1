"""The tokens of a model as llguidance wants them. The process that compiles grammars has them too."""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from dovetail.text.tokenizer import Tokenizer

AHEAD = 256  # characters of a text that is forced, more than the longest token has
Spell = Callable[[str], Sequence[int]]


class Vocabulary:
    """What each token writes.

    tokens: the bytes of each id; b"" for ids that write nothing. special: ids that appear only where a grammar
    names them. spell: the tokens in which the model would write a text; without it they are the longest that fit.
    """

    is_tokenizer_wrapper = True  # llguidance asks for these four
    bos_token_id: int | None = None
    eos_token_id: int | None = None  # llguidance adds an id behind the last, which says that the answer may end

    def __init__(self, tokens: list[bytes], special: Sequence[int], spell: Spell | None = None) -> None:
        from llguidance import LLTokenizer

        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self._special = frozenset(special)
        self._spell = spell
        self.native: LLTokenizer = LLTokenizer(self)  # type: ignore[arg-type]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The first `size` ids of a tokenizer. Ids that end a turn are special, whatever the tokenizer says."""
        tokens = [tokenizer.token_bytes(i) for i in range(size)]
        special = {i for i in tokenizer.special_ids.union(tokenizer.eos_ids) if i < size}
        return cls(tokens, sorted(special), lambda text: tokenizer.encode(text, add_special_tokens=False))

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def words(self) -> int:
        """How many uint32 a mask has, with the bit that says that the answer may end."""
        return (self.native.vocab_size + 31) // 32

    @property
    def complete(self) -> int:
        """The number of that bit."""
        return self.native.eos_token

    def __call__(self, text: str) -> list[int]:
        """Tokens that write the beginning of `text`, as the model would write it in the middle of an answer.

        llguidance asks for what a grammar forces next, and takes the first token. So a long text is read in part.
        A tokenizer may put a space before a text, or read it as a special token. Then a character before it helps,
        and otherwise the longest tokens are taken. There are none if the vocabulary cannot write the text.
        """
        text, spell = text[:AHEAD], self._spell or self.native.greedy_tokenize
        for before in ("", "\x02"):
            ids = list(spell(before + text))
            start = len(spell(before)) if before else 0
            if self._written(ids[start:]) == text.encode():
                return ids[start:]
        ids = self.native.greedy_tokenize(text)
        return ids if self._written(ids) == text.encode() else []

    def _written(self, ids: Sequence[int]) -> bytes | None:
        if any(i >= self.size or i in self._special for i in ids):
            return None
        return b"".join([self.tokens[i] for i in ids])

    # -- from one process to another -----------------------------------------------------------------

    def write(self, file: IO[bytes]) -> None:
        lengths = array.array("I", [len(t) for t in self.tokens])
        special = array.array("I", self.special_token_ids)
        file.write(array.array("I", [len(lengths), len(special)]).tobytes())
        file.write(lengths.tobytes() + special.tobytes() + b"".join(self.tokens))
        file.flush()

    @classmethod
    def read(cls, file: IO[bytes]) -> Vocabulary:
        """What `write` wrote. Nothing is read beyond it, if the file has no buffer."""
        count, specials = _numbers(file, 2)
        lengths, special = _numbers(file, count), _numbers(file, specials)
        spelled, stops = _exactly(file, sum(lengths)), list(itertools.accumulate(lengths))
        return cls([spelled[stop - n : stop] for n, stop in zip(lengths, stops, strict=True)], special)


def _numbers(file: IO[bytes], count: int) -> array.array[int]:
    found = array.array("I")
    found.frombytes(_exactly(file, 4 * count))
    return found


def _exactly(file: IO[bytes], count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        part = file.read(count - len(found))
        if not part:
            raise EOFError("the vocabulary ends too early")
        found += part
    return bytes(found)
