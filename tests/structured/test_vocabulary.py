"""How texts are written in tokens, for what a grammar forces."""

from __future__ import annotations

import gc
import weakref

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from dovetail.structured.vocabulary import AHEAD, Speller, Vocabulary
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer
from tests.helpers.forms import TOKENS, vocabulary


def sentencepiece() -> Tokenizer:
    """A tokenizer that puts a space before every text."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "<0x02>", '"', "\n"]
    backend = Backend(models.BPE(
        {p: i for i, p in enumerate(pieces)}, [("a", "b"), ("▁", "a"), ("▁", "ab")], unk_token="<unk>",
        byte_fallback=True, fuse_unk=True,
    ))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def spelled(tokenizer: Tokenizer, text: str) -> list[bytes]:
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    speller = Speller(
        tokens, sorted(tokenizer.special_ids), lambda t: tokenizer.encode(t, add_special_tokens=False)
    )
    return [tokens[i] for i in speller(text)]


@pytest.mark.parametrize("text", ["ab", "a b", "ba", " ab", 'a"'])
def test_a_space_that_a_tokenizer_adds_is_left_out(text: str) -> None:
    assert b"".join(spelled(sentencepiece(), text)) == text.encode()


def test_a_special_token_that_is_spelled_out_is_text() -> None:
    assert spelled(ByteTokenizer(), "a<|eos|>") == [bytes([b]) for b in b"a<|eos|>"]
    tokens = [b"<s>", b"<", b"s", b">"]
    assert Speller(tokens, [0], lambda text: [0])("<s>") == [1, 2, 3]


def test_the_longest_tokens_are_taken_without_a_tokenizer() -> None:
    speller = Speller(TOKENS, [0, 1], None)
    assert [TOKENS[i] for i in speller('{"abcab": true')] == [b'{"', b"abc", b"ab", b'":', b" ", b"true"]
    assert speller("aQ") == [] and speller("") == []
    assert Speller([b"", b"\xc3", b"\xa9"], [], None)("é") == [1, 2]


def test_a_long_text_is_read_in_part() -> None:
    assert len(Speller(TOKENS, [], None)("x" * 10_000)) == AHEAD


def test_ids_that_end_a_turn_and_those_that_the_model_lacks() -> None:
    found = Vocabulary.of(ByteTokenizer(), 258)
    assert (len(found.tokens), found.special, found.complete) == (258, [256, 257], 258)
    more = Vocabulary.of(ByteTokenizer(), 300)
    assert (len(more.tokens), more.words, more.tokens[260:]) == (300, 10, [b""] * 40)
    plain = sentencepiece()
    assert Vocabulary.of(plain, plain.vocab_size).special == [0, 1]


def test_a_vocabulary_is_freed() -> None:
    found = Vocabulary(list(vocabulary().tokens), [0])
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None
