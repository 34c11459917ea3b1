"""Streaming equals decoding everything at once, and never shows half a character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ggufs import write
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import TEXTS, byte_level_keys, sentencepiece_keys

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.detokenizer import Detokenizer, Vocabulary, byte_fallback, byte_level
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


def stream(tokenizer: Vocabulary, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
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


def test_what_a_piece_adds_to_the_text() -> None:
    assert [byte_level(p) for p in ("a", "Ġb", "Ã©", "Ã", "<｜x｜>")] == ["a", " b", "é", b"\xc3", "<｜x｜>"]
    assert [byte_fallback(p) for p in ("<0x41>", "<0xC3>", "▁a▁", "<0xZZ>", "<0x4>", "<0x411>", "x0x41>")] == [
        b"A", b"\xc3", " a ", "<0xZZ>", "<0x4>", "<0x411>", "x0x41>",
    ]  # fmt: skip


def test_bytes_of_a_fallback_are_shown_when_their_character_is_complete() -> None:
    tokenizer = BUILT["sentencepiece"]
    party = [4 + byte for byte in "\n\n🎉é".encode()]  # a run of byte pieces
    assert stream(tokenizer, party) == ["\n", "\n", "", "", "", "🎉", "", "é", ""]
    one, two, other = 4 + 0xC3, 4 + 0xA9, tokenizer.encode("a", add_special_tokens=False)[-1]
    assert stream(tokenizer, [one, two, other]) == ["", "é", " a", ""]
    assert stream(tokenizer, [one, one, two]) == ["", "\ufffd", "é", ""]
    assert stream(tokenizer, [one, other]) == ["", "\ufffd a", ""]
    again = Detokenizer(tokenizer)
    assert again.push(one) == "" and again.finish() == "\ufffd" and again.finish() == ""


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
    tokenizer = windowed_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        parts = stream(tokenizer, ids, skip=False)
        assert "".join(parts) == text
    assert len("".join(stream(tokenizer, [0x80] * 1000))) > 900


class Words:
    """A decoder of no known kind: id n is a word, 0 is nothing, and a text does not begin with a space."""

    decoder, special_ids, longest = "", frozenset({50}), 0

    def piece(self, token: int) -> str | None:
        return None if token >= 100 else f" w{token}" if token else ""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        return "".join(self.piece(t) or "" for t in ids).removeprefix(" ")


def test_a_window_keeps_what_the_next_id_depends_on() -> None:
    assert stream(Words(), [1, 2, 0, 0, 3, 0, 100, 4, 50, 5], skip=False) == [
        "w1", " w2", "", "", " w3", "", "", " w4", " w50", " w5", "",
    ]  # fmt: skip
    assert Detokenizer(Words()).push(50) == ""
    assert stream(Words(), [0, 50, 1, 50, 2]) == ["", "", "w1", "", " w2", ""]
    for prompt in ([7], [7, 8, 9, 10, 11, 12], [0, 0, 0, 7]):
        detokenizer = Detokenizer(Words(), prompt_ids=prompt)
        assert [detokenizer.push(3), detokenizer.push([4, 5])] == [" w3", " w4 w5"]


def test_a_window_is_as_long_as_it_must_be() -> None:
    words = Words()
    detokenizer = Detokenizer(words, prompt_ids=range(1, 50))
    for token in range(1, 50):
        assert detokenizer.push(token) == f" w{token}"
    assert words.longest == 5  # four of the prompt


def test_a_window_holds_what_may_become_a_character_for_a_while() -> None:
    tokenizer = windowed_bytes()
    assert stream(tokenizer, list("aé🎉".encode())) == ["a", "", "é", "", "", "", "🎉", ""]
    assert stream(tokenizer, [97, 0xC3]) == ["a", "", "\ufffd"]
    assert stream(tokenizer, [0xC3, 97]) == ["", "\ufffda", ""]
    lost = stream(tokenizer, [0x80] * 40)
    assert lost == [*[""] * 31, "\ufffd" * 32, *[""] * 8, "\ufffd" * 8]


def windowed_bytes() -> Tokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.__dict__["decoder"] = ""
    return tokenizer


@pytest.mark.timeout(30)  # it would take hours if the work grew
@pytest.mark.parametrize("kind", KINDS)
def test_work_per_token_does_not_grow(kind: str) -> None:
    tokenizer = BUILT[kind]
    detokenizer = Detokenizer(tokenizer)
    for token in [200, 201, 202, 97, 255] * 20000:  # mostly bytes that never become a character
        detokenizer.push(token)
