"""Names, bytes and places of tokens in log-probabilities, for tokenizers of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.core.engine import Progress
from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request, TokenLogprobs
from dovetail.outputs import Answer, Delta, Stream
from dovetail.server.logprobs import CompletionLogprobs, Place, chat_logprobs, joined
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer
from tests.helpers.examples import examples
from tests.helpers.ggufs import write
from tests.helpers.vocabularies import PIECES, sentencepiece_keys

BUILT: dict[str, Tokenizer] = {"bytes": ByteTokenizer()}
KINDS = ["bytes", "sentencepiece"]
SPACED, PLAIN = (260 + PIECES.index(piece) for piece in ("▁hello", "hello"))
BYTE = 4  # the first byte piece


@pytest.fixture(scope="module", autouse=True)
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = sentencepiece_keys()
    count = len(keys["tokenizer.ggml.tokens"])
    path: Path = tmp_path_factory.mktemp("t") / "t.gguf"
    write(path, keys, {"token_embd.weight": np.zeros((count, 32), np.float32)})
    BUILT["sentencepiece"] = build_tokenizer(GGUFFile(path), count)


def entry(token: int, *others: int) -> TokenLogprobs:
    return TokenLogprobs(token, -5.0, 9, tuple((t, -float(i)) for i, t in enumerate(others)))


def answered(tokenizer: Tokenizer, ids: list[int], stop: int | None = None, **params: Any) -> tuple[Answer, Delta]:
    """An answer of `ids`, the last of which may be the end of a text; and all that it gained."""
    p = SamplingParams(logprobs=0, max_tokens=None, **params)
    request = Request("r/0", [1], p, PageTable(PagePool(1, 4)), 999, seed=0)
    answer = Answer("r", None, [1], p, [Stream(request, tokenizer)], tokenizer, 0.0)
    request.finish_reason, request.stop_reason = ("length", None) if stop is None else ("stop", stop)
    delta = answer.push(Progress(request, ids, [entry(i) for i in ids]), 1.0)
    assert delta is not None
    return answer, delta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@examples(150)
@given(data=st.data())
def test_the_bytes_of_all_tokens_are_the_answer(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = BUILT[kind]
    text = data.draw(st.text("ab é你🎉\n", max_size=10))
    ids = tokenizer.encode(text, add_special_tokens=False)
    for special in data.draw(st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3)):
        ids.insert(data.draw(st.integers(0, len(ids))), special)
    stop = data.draw(st.sampled_from([None, *tokenizer.eos_ids, 97]))
    ids += [] if stop is None else [stop]
    answer, delta = answered(tokenizer, ids, stop, skip_special_tokens=skip)
    content = chat_logprobs(delta, tokenizer)["content"]
    shown = b"".join([bytes(e["bytes"]) for e in content])
    assert shown.decode(errors="replace") == delta.text == answer.output().outputs[0].text
    assert [e["token"] for e in content] == [tokenizer.token_name(i) for i in ids]


def test_chat_shows_the_bytes_of_each_token() -> None:
    spm = BUILT["sentencepiece"]
    _, delta = answered(spm, [SPACED, BYTE + 0xF0])
    delta.logprobs[0] = entry(SPACED, PLAIN, BYTE + 0xF0)
    content = chat_logprobs(delta, spm)["content"]
    assert [(e["token"], bytes(e["bytes"])) for e in content] == [(" hello", b" hello"), (r"\xf0", b"\xf0")]
    assert [(e["token"], bytes(e["bytes"])) for e in content[0]["top_logprobs"]] == [
        ("hello", b"hello"), (r"\xf0", b"\xf0"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@examples(200)
@given(data=st.data())
def test_no_two_tokens_share_a_key(kind: str, data: st.DataObject) -> None:
    tokenizer = BUILT[kind]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    token = data.draw(ids)
    others = data.draw(st.lists(ids, unique=True, max_size=8))
    known = CompletionLogprobs(tokenizer, tokenizer.special_ids).take([entry(token, *others)])
    (name,), (top,) = known["tokens"], known["top_logprobs"]
    assert len(top) == len({token, *others})
    assert top[name] == (-float(others.index(token)) if token in others else -5.0)
    assert sorted(top.values()) == sorted({token: -5.0, **{t: -float(i) for i, t in enumerate(others)}}.values())


def test_names_that_are_shared_become_ids() -> None:
    letter = 260 + PIECES.index("a")  # "a" is a piece, and byte 0x61 another
    (top,) = CompletionLogprobs(BUILT["sentencepiece"], frozenset()).take([entry(BYTE + 0x61, letter)])[
        "top_logprobs"
    ]
    assert top == {"a": -5.0, f"token_id:{letter}": 0.0}


@pytest.mark.parametrize("kind", KINDS)
@examples(200)
@given(text=st.text("ab é你🎉\n", max_size=12), cut=st.integers(0, 30))
def test_text_offset_counts_characters_of_the_text(kind: str, text: str, cut: int) -> None:
    """A token begins at its first character, or in the one that it goes on with; in streams too."""
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    builder = CompletionLogprobs(tokenizer, tokenizer.special_ids)
    known = joined(builder.take([entry(i) for i in ids[:cut]]), builder.take([entry(i) for i in ids[cut:]]))
    data = [tokenizer.token_bytes(i) for i in ids]
    shown, at = b"".join(data), 0
    for token, offset in zip(data, known["text_offset"], strict=True):
        whole = shown[:at].decode(errors="ignore")
        assert offset == len(whole)
        at += len(token)
    assert known["tokens"] == [tokenizer.token_name(i) for i in ids]


def test_a_character_that_is_never_completed_is_one_character() -> None:
    place = Place()
    assert [place.add(part) for part in (b"\xf0", b"\x9f", b"a", b"\xf0", b"\xf0", b"b")] == [0, 0, 1, 2, 3, 4]
    assert place.at == 5  # U+FFFD a U+FFFD U+FFFD b


@pytest.mark.parametrize(("skip", "offsets"), [(True, [0, 1, 1, 2]), (False, [0, 1, 11, 12])])
def test_control_tokens_count_where_the_text_shows_them(skip: bool, offsets: list[int]) -> None:
    ids = [97, 259, 98, 99]
    tokenizer = BUILT["bytes"]
    known = CompletionLogprobs(tokenizer, tokenizer.special_ids if skip else set()).take([entry(i) for i in ids])
    assert known["text_offset"] == offsets and known["tokens"][1] == "<|im_end|>"


def echo(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    builder = CompletionLogprobs(tokenizer, tokenizer.special_ids)
    known = builder.take_prompt(ids, text, [entry(i) for i in ids[1:]])
    assert known["token_logprobs"] == [None, *[-5.0] * (len(ids) - 1)] and known["top_logprobs"][0] is None
    assert known["tokens"] == [tokenizer.token_name(i) for i in ids]
    after = builder.take([entry(97)])["text_offset"]
    assert after == [len(text)]
    return known["text_offset"]


def test_an_echoed_prompt_counts_what_it_shows() -> None:
    tokenizer = ByteTokenizer(add_bos=True)
    assert echo(tokenizer, tokenizer.encode("hé"), "hé") == [0, 0, 1, 1]
    assert echo(tokenizer, [256, 97, 259, 98], tokenizer.decode([256, 97, 259, 98])) == [0, 0, 1, 1]
    spelled = "a<|im_end|>b"  # a text may spell control tokens
    assert echo(tokenizer, tokenizer.encode(spelled), spelled) == [0, 0, 1, 11]
    spm = BUILT["sentencepiece"]
    assert echo(spm, spm.encode("hello hello"), "hello hello") == [0, 0, 5]  # its first space is not in the text
    assert echo(spm, spm.encode(" hello"), " hello")[0] == 0
