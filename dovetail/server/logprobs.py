"""Log-probabilities in the shapes of the chat and the completions API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dovetail.core.types import TokenLogprobs
from dovetail.outputs import Logprob, named
from dovetail.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf


def chat_logprobs(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"content": [_chat_entry(e, tokenizer) for e in entries]}


def _chat_entry(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    known = named(entry, tokenizer)
    top = [_chat_token(known[token]) for token, _ in entry.top]
    return {**_chat_token(known[entry.token]), "top_logprobs": top}


def _chat_token(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    return {"token": text, "logprob": max(logprob.logprob, LOWEST), "bytes": list(text.encode())}


class CompletionLogprobs:
    """Builds the parallel lists of the completions API. `text_offset` counts on over the chunks of a stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.offset = 0
        self.begun = False  # whether a part of the choice was already shown

    def take(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            known = named(entry, self.tokenizer)
            top: dict[str, float] = {}
            for logprob in known.values():  # of tokens with the same text, the likelier one counts
                text = logprob.decoded_token or ""
                top[text] = max(top.get(text, LOWEST), logprob.logprob)
            self._add(out, known[entry.token].decoded_token or "", max(entry.logprob, LOWEST), top)
        return out

    def take_prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Add the echoed prompt. Its first token has no log-probability."""
        first: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._add(first, self.tokenizer.decode(ids[:1], skip_special_tokens=False), None, None)
        return joined(first, self.take(entries))

    def _add(self, out: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        out["tokens"].append(text)
        out["token_logprobs"].append(logprob)
        out["top_logprobs"].append(top)
        out["text_offset"].append(self.offset)
        self.offset += len(text)


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
