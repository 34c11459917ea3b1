"""A random byte-level BPE vocabulary of any size, as GGUF metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from dovetail.core.errors import ConfigError
from dovetail.text.detokenizer import BYTE_ALPHABET

SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
SMALLEST = 256 + len(SPECIAL)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SPACE = "Ġ"  # how byte-level BPE spells a space
_LONGEST = 12  # characters of a token
_NORMAL, _CONTROL = 1, 3  # types of tokens
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_vocabulary(size: int, seed: int) -> dict[str, Any]:
    """Metadata of a tokenizer with `size` tokens: every byte, four control tokens, and random words.

    So every text has tokens, and every token but a lone byte of a longer character is a text. The same size and
    seed give the same vocabulary. ConfigError if `size` is below 260.
    """
    if size < SMALLEST:
        raise ConfigError(f"a vocabulary of {size} is too small: {SMALLEST} tokens are bytes and control tokens")
    words, merges = _words(size - SMALLEST, np.random.SFC64(np.random.SeedSequence([seed, size])))
    tokens = [*BYTE_ALPHABET, *SPECIAL, *words]
    kinds = [_NORMAL] * 256 + [_CONTROL] * len(SPECIAL) + [_NORMAL] * len(words)
    ids = {name: 256 + SPECIAL.index(f"<|{token}|>") for name, token in (("bos", "bos"), ("eos", "eos"))}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["bos"],
        "tokenizer.ggml.eos_token_id": ids["eos"],
        "tokenizer.ggml.eot_token_id": 256 + SPECIAL.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _TEMPLATE,
    }


def _words(count: int, draws: np.random.SFC64) -> tuple[list[str], list[str]]:
    """`count` words, each the union of two earlier ones or letters, and the merges that make them."""
    starts, inner = [_SPACE, *_LETTERS], list(_LETTERS)  # what a word may begin with, and what may follow
    words: list[str] = []
    merges: list[str] = []
    seen = set(starts)
    while len(words) < count:
        for draw in draws.random_raw(4096).tolist():
            first, second = _early(starts, draw >> 32), _early(inner, draw & 0xFFFFFFFF)
            word = first + second
            if len(word) > _LONGEST or word in seen:
                continue
            seen.add(word)
            words.append(word)
            merges.append(f"{first} {second}")
            starts.append(word)
            if not word.startswith(_SPACE):
                inner.append(word)
            if len(words) == count:
                break
    return words, merges


def _early(words: list[str], draw: int) -> str:
    """One of `words`, rather an early one: so short ones join first, as they do in texts. `draw` has 32 bits."""
    part = draw / 2**32
    square = part * part
    return words[int(square * square * square * len(words))]
