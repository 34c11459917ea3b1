"""Token ids -> text, a few at a time, for streaming.

The pieces joined (with `finish`) are what decoding all ids at once gives. Work per token does not grow with
the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

_WINDOW = 32  # the most ids that the general method keeps undecided


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in for each byte: itself if it is printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()
_NO_BYTE = "\uffff"
_AS_BYTES = dict.fromkeys(range(256), _NO_BYTE) | {ord(char): chr(byte) for char, byte in BYTE_ALPHABET.items()}


Piece = str | bytes  # whole characters, or bytes that form characters only with others


def as_bytes(piece: Piece) -> bytes:
    return piece.encode() if isinstance(piece, str) else piece


def byte_level(piece: str) -> Piece:
    """What a piece of byte-level BPE adds to the text."""
    try:
        data = piece.translate(_AS_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # an added token that is spelled in plain text
        return piece
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def byte_fallback(piece: str) -> Piece:
    """What a piece of SentencePiece adds to the text: one byte, or text with a mark for space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("\u2581", " ")


def looks_byte_level(ids: Callable[[str], int | None]) -> bool:
    """Whether a vocabulary spells bytes as byte-level BPE does, and nothing as SentencePiece does."""
    return all(ids(char) is not None for char in BYTE_ALPHABET) and ids("<0x0A>") is None and ids("\u2581") is None


class Pieces(dict[int, Piece]):
    """What each id of a vocabulary adds to the text, computed when it is first needed.

    `spelling` gives the vocabulary's piece of an id, or None. `meaning` gives what an id with that piece adds.
    """

    def __init__(self, spelling: Callable[[int], str | None], meaning: Callable[[int, str], Piece]) -> None:
        super().__init__()
        self._spelling = spelling
        self._meaning = meaning

    def __missing__(self, token: int) -> Piece:
        piece = self._spelling(token) if 0 <= token < 1 << 32 else None
        if piece is None:
            return b""  # not kept: there is no end of ids outside the vocabulary
        found = self[token] = self._meaning(token, piece)
        return found


class Vocabulary(Protocol):
    """What a detokenizer asks of a tokenizer. `decoder` names how pieces become text (`Tokenizer.decoder`)."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def decoder(self) -> str: ...

    @property
    def pieces(self) -> Pieces: ...

    def piece(self, token: int) -> str | None: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class _Stream(Protocol):
    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _Bytes:
    """Ids are bytes, whatever comes before them: hold those of an incomplete character, at most three."""

    def __init__(self, pieces: Pieces, strip_first_space: bool) -> None:
        self._pieces = pieces
        self._strip = strip_first_space
        self._held = b""

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if not self._held and isinstance(piece, str):
            return self._emit(piece)
        data = self._held + as_bytes(piece)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return self._emit(text)

    def finish(self) -> str:
        held, self._held = self._held, b""
        return self._emit(held.decode(errors="replace"))

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Windowed:
    """Any other decoder: decode a short window with and without the new ids, and emit the difference."""

    def __init__(self, tokenizer: Vocabulary, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-4:])
        self._done = len(self._window)

    def push(self, token: int) -> str:
        if self._tokenizer.piece(token) is None:
            return ""
        self._window.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._done], skip_special_tokens=False)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        undecided = text.endswith("\ufffd") and len(self._window) - self._done < _WINDOW
        if len(text) <= len(before) or (undecided and not final):
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        return text[len(before) :]


class Detokenizer:
    """Streams the text of one sequence of ids.

    `push` returns the text that has become certain: never half a character, never a U+FFFD that a later id
    would resolve. `finish` returns the rest. With `prompt_ids` the text continues a prompt: a first piece
    keeps its leading space. Ids that the vocabulary does not have are skipped, and so are special tokens but
    `shown_ids`, unless `skip_special_tokens` is False (`skipped` has those that are).
    """

    def __init__(
        self,
        tokenizer: Vocabulary,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: Iterable[int] = (),
    ) -> None:
        self.skipped = tokenizer.special_ids.difference(shown_ids) if skip_special_tokens else frozenset()
        self._stream: _Stream
        if tokenizer.decoder:
            self._stream = _Bytes(tokenizer.pieces, tokenizer.decoder == "fallback-strip" and not prompt_ids)
        else:
            self._stream = _Windowed(tokenizer, prompt_ids)

    def push(self, ids: int | Iterable[int]) -> str:
        """Append one id or several; return the new text, often ""."""
        if isinstance(ids, int):
            return "" if ids in self.skipped else self._stream.push(ids)
        return "".join([self._stream.push(token) for token in ids if token not in self.skipped])

    def finish(self) -> str:
        """The text still held back; an incomplete character becomes U+FFFD."""
        return self._stream.finish()
