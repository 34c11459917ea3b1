"""What each id adds to a text, for every kind of tokenizer: the bytes of all ids, joined, are the text."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ggufs import write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from vocabularies import TEXTS, byte_level_keys, sentencepiece_keys

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.detokenizer import BYTE_ALPHABET
from dovetail.text.tokenizer import Tokenizer
from tests.helpers.examples import examples

MARK = "\u2581"
WORDS = ["hello", "world", "h", "e", "l", "o", "é", "你", "ll", "12", "."]


def metaspace() -> Tokenizer:
    """Pieces with a mark for space, a byte for each of the others, and a decoder that only knows the marks."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + WORDS + [MARK, MARK + "h", MARK + "hello", MARK * 2]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(["<unk>", *pieces])]
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(backend)


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    backend = Backend(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend)


def words() -> Tokenizer:
    """No decoder at all: words are joined by spaces."""
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def nested() -> Tokenizer:
    """Byte-level as some files have it: a sequence in a sequence, with an added token in plain text."""
    backend = Backend(models.BPE(vocab=dict(BYTE_ALPHABET), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()])
    backend.add_tokens([AddedToken("café", special=False, normalized=False)])
    return Tokenizer(backend)


def replaced() -> Tokenizer:
    """A decoder that is not known by name: it ends with a step that looks at each piece."""
    vocabulary = {MARK: 0, **{word: 1 + index for index, word in enumerate(WORDS)}}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token=MARK))
    backend.normalizer = normalizers.Replace(" ", MARK)
    backend.decoder = decoders.Replace(MARK, " ")
    return Tokenizer(backend)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer, "nested": nested, "metaspace": metaspace, "word pieces": word_pieces, "words": words,
    "replaced": replaced,
}  # fmt: skip
FILES = {
    "byte level": byte_level_keys("gpt-2"),
    "sentencepiece": sentencepiece_keys(),
    "no prefix": sentencepiece_keys(prefix=False),
}
BUILT: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> None:
    path: Path = tmp_path_factory.mktemp("t")
    for name, keys in FILES.items():
        count = len(keys["tokenizer.ggml.tokens"])
        file = write(path / f"{name}.gguf", keys, {"token_embd.weight": np.zeros((count, 32), np.float32)})
        BUILT[name] = build_tokenizer(GGUFFile(file), count)
    BUILT.update({name: make() for name, make in KINDS.items()})


def answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of an answer with `ids`, as it is streamed."""
    prompt = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) in ("h", "hello")][:1]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, prompt_ids=prompt)
    return detokenizer.push(ids) + detokenizer.finish()


def joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join([tokenizer.token_bytes(i) for i in ids]).decode(errors="replace")


@pytest.mark.parametrize("kind", [*KINDS, *FILES])
@examples(150)
@given(text=st.one_of(st.text(max_size=30), st.text("helo wrd12.é你🎉\n", max_size=30), st.sampled_from(TEXTS)))
def test_of_any_text(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert joined(tokenizer, ids) == answer(tokenizer, ids)
    if kind in ("bytes", "nested", "byte level", "no prefix"):
        assert joined(tokenizer, ids) == text
    if kind == "sentencepiece" and text and "<" not in text:
        assert joined(tokenizer, ids) == " " + text
    if kind == "metaspace" and "<" not in text:
        assert joined(tokenizer, ids).removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("kind", ["bytes", "nested", "byte level", "sentencepiece", "no prefix"])
@examples(200)
@given(ids=st.lists(st.integers(0, 310), max_size=30))
def test_of_any_ids(kind: str, ids: list[int]) -> None:
    assert joined(BUILT[kind], ids) == answer(BUILT[kind], ids)


@pytest.mark.parametrize("kind", ["bytes", "nested", "metaspace", "word pieces", "words", "replaced", *FILES])
@examples(100)
@given(text=st.one_of(st.text(max_size=12), st.text("he 你🎉\n", max_size=12)))
def test_text_is_shown_as_soon_as_its_characters_are_complete(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    prompt = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) in ("h", "hello")][:1]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, prompt_ids=prompt)
    shown, sent = "", b""
    for token in ids:
        shown += detokenizer.push(token)
        sent += tokenizer.token_bytes(token)
        assert shown == codecs.utf_8_decode(sent, "strict", False)[0]
    assert detokenizer.finish() == ""


def test_parts_of_characters_and_leading_spaces_are_kept() -> None:
    spm, level = BUILT["sentencepiece"], BUILT["byte level"]
    named = {spm.piece(i): spm.token_bytes(i) for i in range(spm.vocab_size)}
    assert (named["hello"], named[MARK + "hello"], named["<0xF0>"], named["</s>"]) == (
        b"hello", b" hello", b"\xf0", b"</s>",
    )  # fmt: skip
    assert {level.token_bytes(level.backend.token_to_id(p)) for p in ("Ã", "Ġhello", "<|im_end|>")} == {
        b"\xc3", b" hello", b"<|im_end|>",
    }  # fmt: skip
    assert BUILT["nested"].token_bytes(256) == "café".encode() and BUILT["nested"].decode([256]) == "café"
    assert BUILT["metaspace"].token_bytes(1 + 0xF0) == b"\xf0"


@pytest.mark.parametrize("kind", [*KINDS, *FILES])
def test_ids_outside_the_vocabulary_add_nothing(kind: str) -> None:
    for token in (-1, BUILT[kind].vocab_size, 1 << 31, 1 << 32, 1 << 70):
        assert BUILT[kind].token_bytes(token) == b""
