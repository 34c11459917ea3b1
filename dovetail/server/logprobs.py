"""Log-probabilities in the shapes of the chat and the completions API."""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set
from typing import Any

from dovetail.core.types import TokenLogprobs
from dovetail.outputs import Delta, Logprob, named
from dovetail.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf


def chat_logprobs(delta: Delta, tokenizer: Tokenizer) -> dict[str, Any]:
    """The log-probabilities of a delta. The bytes of all tokens of an answer, joined, are its text: control tokens
    that it leaves out and the token that stopped it have none.
    """
    entries, skipped = delta.logprobs, delta.stream.detokenizer.skipped
    content = [_chat_entry(entry, tokenizer, skipped) for entry in entries]
    if entries and delta.finish_reason is not None and delta.stream.unheard:
        content[-1]["bytes"] = []
    return {"content": content}


def _chat_entry(entry: TokenLogprobs, tokenizer: Tokenizer, skipped: Set[int]) -> dict[str, Any]:
    top = [_chat_token(token, logprob, tokenizer, skipped) for token, logprob in entry.top]
    return {**_chat_token(entry.token, entry.logprob, tokenizer, skipped), "top_logprobs": top}


def _chat_token(token: int, logprob: float, tokenizer: Tokenizer, skipped: Set[int]) -> dict[str, Any]:
    data = [] if token in skipped else list(tokenizer.token_bytes(token))
    return {"token": tokenizer.token_name(token), "logprob": max(logprob, LOWEST), "bytes": data}


class CompletionLogprobs:
    """Builds the parallel lists of the completions API. `text_offset` counts on over the chunks of a stream.

    skipped: control tokens that the text leaves out.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Set[int]) -> None:
        self.tokenizer = tokenizer
        self.skipped = skipped
        self.place = Place()
        self.begun = False  # whether a part of the choice was already shown

    def take(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        out = _lists()
        for entry in entries:
            data = b"" if entry.token in self.skipped else self.tokenizer.token_bytes(entry.token)
            self._add(out, entry, self.place.add(data))
        return out

    def take_prompt(self, ids: Sequence[int], text: str, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Add the prompt, which is echoed as `text`. Its first token has no log-probability."""
        out = _lists()
        place = Place()
        for token, entry in zip(ids, [None, *entries], strict=False):  # fewer if it was aborted
            offset = place.add(self._shown(token, text[place.at :]))
            self._add(out, token if entry is None else entry, min(offset, len(text)))
        self.place.at = len(text)
        return out

    def _shown(self, token: int, rest: str) -> bytes:
        """What a token of the prompt adds to a text that goes on with `rest`.

        Text that a user wrote may have control tokens; those that were added to it are not there. Nor is a space
        that the tokenizer put before its first word.
        """
        data = self.tokenizer.token_bytes(token)
        if token in self.tokenizer.special_ids:
            return data if rest.startswith(data.decode(errors="replace")) else b""
        return data[1:] if data.startswith(b" ") and not rest.startswith(" ") else data

    def _add(self, out: dict[str, Any], known: TokenLogprobs | int, offset: int) -> None:
        token = known if isinstance(known, int) else known.token
        out["tokens"].append(self.tokenizer.token_name(token))
        out["token_logprobs"].append(None if isinstance(known, int) else max(known.logprob, LOWEST))
        out["top_logprobs"].append(None if isinstance(known, int) else self._top(known))
        out["text_offset"].append(offset)

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """By name, and for names that two tokens share by id. The chosen token has its own name."""
        top: dict[str, float] = {}
        for token, logprob in {entry.token: entry.logprob, **dict(entry.top)}.items():
            name = self.tokenizer.token_name(token)
            top[f"token_id:{token}" if name in top else name] = max(logprob, LOWEST)
        return top


class Place:
    """Counts the characters of a text whose bytes come in parts."""

    def __init__(self) -> None:
        self.at = 0  # whole characters so far
        self._held = b""  # the beginning of the next one

    def add(self, data: bytes) -> int:
        """Where `data` begins: at its first character, or in the one that it goes on with."""
        begin = self.at + (bool(self._held and data) and not _goes_on(self._held + data[:1]))
        text, used = codecs.utf_8_decode(self._held + data, "replace", False)
        self._held = (self._held + data)[used:]
        self.at += len(text)
        return begin


def _goes_on(data: bytes) -> bool:
    """Whether more bytes can make this a character, or it is one."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _lists() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {key: first[key] + then[key] for key in first}


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's shape: by token id, None for the first token."""
    return [None, *(_by_id(named(entry, tokenizer)) for entry in entries)]


def _by_id(known: dict[int, Logprob]) -> dict[str, Any]:
    return {
        str(token): {"logprob": max(v.logprob, LOWEST), "rank": v.rank, "decoded_token": v.decoded_token}
        for token, v in known.items()
    }
