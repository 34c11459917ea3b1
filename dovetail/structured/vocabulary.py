"""The tokens of a model as llguidance wants them. The process that compiles grammars has them too."""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from dovetail.text.tokenizer import Tokenizer

AHEAD = 256  # characters of a text that is forced, more than the longest token has
REMEMBERED = 4096  # texts that were forced, each of at most AHEAD characters
Spell = Callable[[str], Sequence[int]]


class Speller:
    """The tokens in which the model would write a text. llguidance asks for the attributes.

    tokens: the bytes of each id; b"" for ids that write nothing. special: ids that appear only where a grammar
    names them. spell: the model's own way to read a text.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None  # llguidance adds an id behind the last, which says that the answer may end

    def __init__(self, tokens: list[bytes], special: Sequence[int], spell: Spell | None) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self._special = frozenset(special)
        self._spell = spell
        self._remembered = lru_cache(REMEMBERED)(self._tokens_of)
        if spell is None:
            self._ids  # noqa: B018 - made now, and not by each process that is forked

    def __call__(self, text: str) -> list[int]:
        """Tokens that write the beginning of `text`, as the model would write it in the middle of an answer.

        llguidance asks for what a grammar forces next, and takes the first token. So a long text is read in part.
        A tokenizer may put a space before a text, or read it as a special token. Then a character before it helps,
        and otherwise the longest tokens are taken. There are none if the vocabulary cannot write the text.
        """
        return list(self._remembered(text[:AHEAD]))

    def _tokens_of(self, text: str) -> Sequence[int]:
        data = text.encode()
        if self._spell is not None:
            for before in ("", "\x02"):
                ids = list(self._spell(before + text))
                start = len(self._spell(before)) if before else 0
                if self._written(ids[start:]) == data:
                    return ids[start:]
        return self._longest(data)

    def _written(self, ids: Sequence[int]) -> bytes | None:
        if any(i >= len(self.tokens) or i in self._special for i in ids):
            return None
        return b"".join([self.tokens[i] for i in ids])

    def _longest(self, data: bytes) -> list[int]:
        found, at, most = [], 0, max(map(len, self._ids), default=0)
        while at < len(data):
            lengths = range(min(most, len(data) - at), 0, -1)
            fits = next((n for n in lengths if data[at : at + n] in self._ids), None)
            if fits is None:
                return []
            found.append(self._ids[data[at : at + fits]])
            at += fits
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {t: i for i, t in enumerate(self.tokens) if t and i not in self._special}


class Vocabulary:
    """What each token writes. See `Speller`."""

    def __init__(self, tokens: list[bytes], special: Sequence[int], spell: Spell | None = None) -> None:
        from llguidance import LLTokenizer

        self.tokens = tokens
        self.special = sorted(special)
        self.native: LLTokenizer = LLTokenizer(Speller(tokens, special, spell))  # type: ignore[arg-type]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The first `size` ids of a tokenizer. Ids that end a turn are special, whatever the tokenizer says."""
        tokens = [tokenizer.token_bytes(i) for i in range(size)]
        special = {i for i in tokenizer.special_ids.union(tokenizer.eos_ids) if i < size}
        return cls(tokens, sorted(special), lambda text: tokenizer.encode(text, add_special_tokens=False))

    @property
    def words(self) -> int:
        """How many uint32 a mask has, with the bit that says that the answer may end."""
        return (self.native.vocab_size + 31) // 32

    @property
    def complete(self) -> int:
        """The number of that bit."""
        return self.native.eos_token

    # -- from one process to another -----------------------------------------------------------------

    def write(self, file: IO[bytes]) -> None:
        lengths = array.array("I", [len(t) for t in self.tokens])
        special = array.array("I", self.special)
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
