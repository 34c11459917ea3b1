"""Token ids -> text, a few at a time, for streaming.

The pieces joined (with `finish`) are what decoding all ids at once gives. Work per token does not grow with
the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dovetail.tokenizer import Tokenizer

_WINDOW = 32  # ids that the general method keeps undecided at most


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in for each byte: itself if it is printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()


class _Stream(Protocol):
    def push(self, token: int, piece: str) -> str: ...

    def finish(self) -> str: ...


class _ByteLevel:
    """Pieces spell bytes: hold the bytes of an incomplete character, at most three."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, piece: str) -> str:
        try:
            data = bytes([BYTE_ALPHABET[char] for char in piece])
        except KeyError:  # an added token that is spelled in plain text
            data = piece.encode()
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallback:
    """SentencePiece: pieces are text with a mark for space, characters outside the vocabulary are runs of
    bytes.

    A run is decoded as a whole (one bad byte makes every byte of it U+FFFD), so it is held until it ends.
    """

    def __init__(self, strip_first_space: bool) -> None:
        self._strip = strip_first_space
        self._run = bytearray()

    def push(self, token: int, piece: str) -> str:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                self._run.append(int(piece[3:5], 16))
                return ""
            except ValueError:
                pass
        return self._emit(self._end_run() + piece.replace("\u2581", " "))

    def finish(self) -> str:
        return self._emit(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Windowed:
    """Any other decoder: decode a short window with and without the new ids, and emit the difference."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-4:])
        self._done = len(self._window)

    def push(self, token: int, piece: str) -> str:
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
    keeps its leading space. Ids that the vocabulary does not have are skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._piece = tokenizer.piece
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream: _Stream
        if tokenizer.decoder == "bytes":
            self._stream = _ByteLevel()
        elif tokenizer.decoder in ("fallback", "fallback-strip"):
            self._stream = _ByteFallback(tokenizer.decoder == "fallback-strip" and not prompt_ids)
        else:
            self._stream = _Windowed(tokenizer, prompt_ids)

    def push(self, ids: int | Iterable[int]) -> str:
        """Append one id or several; return the new text, often ""."""
        parts = []
        for token in (ids,) if isinstance(ids, int) else ids:
            if token in self._skipped:
                continue
            piece = self._piece(token)
            if piece is not None:
                parts.append(self._stream.push(token, piece))
        return "".join(parts)

    def finish(self) -> str:
        """The text still held back; an incomplete character becomes U+FFFD."""
        return self._stream.finish()
