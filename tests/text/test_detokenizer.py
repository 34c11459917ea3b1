"""Streaming equals decoding everything at once, and never shows half a character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ggufs import write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from vocabularies import TEXTS, byte_level_keys, sentencepiece_keys

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.detokenizer import Detokenizer
from dovetail.text.tokenizer import Tokenizer
from tests.helpers.examples import examples

KINDS = ("byte-level", "bytes", "sentencepiece", "no-prefix")
BUILT: dict[str, Tokenizer] = {"bytes": ByteTokenizer()}


@pytest.fixture(scope="module", autouse=True)
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = {
        "byte-level": byte_level_keys("gpt-2"),
        "sentencepiece": sentencepiece_keys(),
        "no-prefix": sentencepiece_keys(prefix=False),
    }
    path: Path = tmp_path_factory.mktemp("t")
    for name, metadata in keys.items():
        count = len(metadata["tokenizer.ggml.tokens"])
        file = write(path / f"{name}.gguf", metadata, {"token_embd.weight": np.zeros((count, 32), np.float32)})
        BUILT[name] = build_tokenizer(GGUFFile(file), count)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [detokenizer.push(token) for token in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@examples(300)
@given(ids=st.lists(st.integers(0, 270), max_size=40), skip=st.booleans())
def test_any_ids(kind: str, ids: list[int], skip: bool) -> None:
    assert "".join(stream(BUILT[kind], ids, skip)) == BUILT[kind].decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@examples(200)
@given(text=st.text(max_size=40))
def test_any_text(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    increments = stream(tokenizer, ids, skip=False)
    assert "".join(increments) == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in increments)
    whole = ""
    for part in increments:
        whole += part
        assert text.startswith(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_push_takes_several_ids(kind: str) -> None:
    tokenizer = BUILT[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.detokenizer()
        assert detokenizer.push(ids) + detokenizer.finish() == tokenizer.decode(ids)


def test_after_a_prompt_the_leading_space_stays() -> None:
    tokenizer = BUILT["sentencepiece"]
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in ("hello", "world"))
    assert tokenizer.detokenizer(prompt_ids=prompt).push(answer) == " world"
    assert tokenizer.detokenizer().push(answer) == "world"


def test_characters_appear_with_their_last_byte() -> None:
    party = list("🎉é".encode())
    assert stream(BUILT["bytes"], party) == ["", "", "", "🎉", "", "é", ""]
    assert stream(BUILT["bytes"], [0xF0, 97, 0x9F]) == ["", "\ufffda", "\ufffd", ""]


def test_ids_outside_the_vocabulary() -> None:
    assert stream(BUILT["bytes"], [97, 100000, 98]) == ["a", "", "b", ""]


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(ids=st.lists(st.sampled_from([*range(60), 195, 169, 226, 156, 147, 100000]), max_size=20))
def test_ids_outside_the_vocabulary_do_not_come_between_bytes(kind: str, ids: list[int]) -> None:
    assert "".join(stream(BUILT[kind], ids)) == BUILT[kind].decode(ids)
    assert 100000 not in BUILT[kind].pieces


def test_streams_of_one_tokenizer_do_not_disturb_each_other() -> None:
    for kind in KINDS:
        tokenizer = BUILT[kind]
        texts = ["é🎉 hello", "hello 漢é", "🎉🎉"]
        ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
        streams = [tokenizer.detokenizer() for _ in texts]
        parts = ["" for _ in texts]
        for at in range(max(map(len, ids))):
            for i, own in enumerate(ids):
                parts[i] += streams[i].push(own[at : at + 1])
        assert [p + s.finish() for p, s in zip(parts, streams, strict=True)] == [tokenizer.decode(i) for i in ids]


def test_other_decoders_use_a_window() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    tokenizer.__dict__.pop("decoder", None)
    assert tokenizer.decoder == ""
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        parts = stream(tokenizer, ids, skip=False)
        assert "".join(parts) == text
    assert len("".join(stream(tokenizer, [0x80] * 1000))) > 900


@pytest.mark.timeout(30)  # it would take hours if the work grew
@pytest.mark.parametrize("kind", KINDS)
def test_work_per_token_does_not_grow(kind: str) -> None:
    tokenizer = BUILT[kind]
    detokenizer = Detokenizer(tokenizer)
    for token in [200, 201, 202, 97, 255] * 20000:  # mostly bytes that never become a character
        detokenizer.push(token)
