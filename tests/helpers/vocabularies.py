"""Small tokenizers of each kind, as (GGUF metadata, texts)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from dovetail.text.detokenizer import BYTE_ALPHABET

CONTROL = ["<unk>", "<s>", "</s>", "[INST]"]
PIECES = [
    *("▁", "h", "e", "l", "o", "w", "r", "d", "a", "b", "c", "1", "2", ".", ",", "é", "你"),
    *(
        "he",
        "ll",
        "▁w",
        "or",
        "llo",
        "hello",
        "▁hello",
        "ld",
        "▁world",
        "▁▁",
        "▁▁▁▁",
        "ab",
        "▁a",
        "bc",
        "abc",
    ),
]

TEXTS = [
    "hello world",
    "  hello   world  ",
    "",
    " ",
    "\n\n\thello\n",
    "def f(x):\n    return x ** 2  # 12345\n",
    "你好，世界！",
    "🎉👩‍👩‍👧‍👦 café é",
    "I'll've 3.14159e-10 ½ ②",
    "\u00a0nbsp\u2003em \ufffd x",
    "abc abc, 1221.",
    "<|im_start|>hello<|im_end|> 12",
]


def sentencepiece_keys(prefix: bool = True) -> dict[str, Any]:
    """Metadata of a "llama" tokenizer with byte fallback; scores fall along the vocabulary."""
    tokens = CONTROL + [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    kinds = [2, 3, 3, 3] + [6] * 256 + [1] * len(PIECES)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(index) for index in range(len(PIECES))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.chat_template": (
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
            "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        ),
    }


def sentencepiece_reference(text: str, prefix: bool = True) -> list[int]:
    """SentencePiece's BPE, written down naively: join the best-scoring neighbours until none can be
    joined.
    """
    if not text:
        return []
    scores = {piece: -float(index) for index, piece in enumerate(PIECES)}
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        best = max(
            ((scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores),
            default=None,
        )
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [260 + PIECES.index(part)] if part in scores else [4 + byte for byte in part.encode()]
    return ids


def byte_level_keys(pre: str, **changes: Any) -> dict[str, Any]:
    """Metadata of a "gpt2" tokenizer; merges join digits, letters, spaces and newlines so that word cuts
    show.
    """
    first = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]
    second = ["1 2", "12 1", "2 1", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "' l", "'l l", "! Ċ", ") :", "ä ½", "A b", "C a"]
    merges = first + second
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *BYTE_ALPHABET,
        *(m.replace(" ", "") for m in merges),
    ]
    tokens.append("wor12")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes
