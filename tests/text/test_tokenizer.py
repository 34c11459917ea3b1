"""Encoding and decoding: GGUF vocabularies, Hugging Face files, errors."""

from __future__ import annotations

import logging
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from ggufs import write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from vocabularies import CONTROL, PIECES, TEXTS, byte_level_keys, sentencepiece_keys, sentencepiece_reference

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import FAMILIES, build_tokenizer
from dovetail.core.errors import ModelError, RequestError
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer
from tests.helpers.examples import examples

LAST = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS: dict[str, pre_tokenizers.PreTokenizer] = {}


def Split(regex: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(regex), "isolated")


@pytest.fixture(scope="module", autouse=True)
def words_of_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    for pre in PUBLISHED:
        WORDS[pre] = build(tmp_path_factory.mktemp("w"), byte_level_keys(pre)).backend.pre_tokenizer


def build(path: Path, keys: dict[str, Any]) -> Tokenizer:
    count = len(keys["tokenizer.ggml.tokens"])
    file = write(path / "t.gguf", keys, {"token_embd.weight": np.zeros((count, 32), np.float32)})
    return build_tokenizer(GGUFFile(file), count)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    tokenizer = build(tmp_path, sentencepiece_keys(prefix))
    rng = random.Random(0)
    samples = [
        "".join(rng.choice("hello wrdabc12.,é你🎉\n  ") for _ in range(rng.randrange(1, 40))) for _ in range(300)
    ]
    for text in [text for text in TEXTS if "<" not in text] + samples:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == sentencepiece_reference(text, prefix), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == [1, *ids]


def test_sentencepiece_control_tokens(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, sentencepiece_keys())
    hello = 260 + PIECES.index("▁hello")
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False) == [1, hello, 2]
    assert tokenizer.decode([1, hello, 2]) == "hello"
    assert tokenizer.decode([1, hello, 2], skip_special_tokens=False) == "<s> hello</s>"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 260 + len(PIECES))
    assert tokenizer.special_ids == set(range(len(CONTROL)))


CUTS = {
    # text: how words are cut; the merges would join across the cuts
    "llama-bpe": [("1212", ["121", "2"]), ("wor12", ["w", "or", "12"]), ("!\n", ["!Ċ"]), ("x'll", ["x", "'ll"])],
    "qwen2": [("1212", ["1", "2", "1", "2"]), ("!\n", ["!Ċ"]), ("wor12", ["w", "or", "1", "2"])],
    "gpt-2": [("1212", ["12", "12"]), ("!\n", ["!", "Ċ"]), ("x'll", ["x", "'", "ll"])],
    "smollm": [("1212", ["1", "2", "1", "2"]), ("!\n", ["!", "Ċ"])],
    "gpt-4o": [("Ab", ["Ab"]), ("bCa", ["b", "Ca"]), ("1212", ["121", "2"])],
    "tekken": [("12", ["1", "2"]), ("x'll", ["x", "'ll"]), ("bCa", ["b", "Ca"]), ("!\n", ["!Ċ"])],
    "deepseek-coder": [("12", ["1", "2"]), ("!\n", ["!", "Ċ"]), ("\n\n", ["Ċ", "Ċ"]), ("x'll", ["x", "'", "ll"])],
    "deepseek-llm": [("12", ["1", "2"]), ("!\n", ["!", "Ċ"]), ("x'll", ["x", "'", "ll"])],
}


@pytest.mark.parametrize("pre", CUTS)
def test_word_cuts(pre: str, tmp_path: Path) -> None:
    tokenizer = build(tmp_path, byte_level_keys(pre))
    for text, pieces in CUTS[pre]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.backend.id_to_token(token) for token in ids] == pieces
        assert tokenizer.decode(ids) == text


# What published tokenizer.json files say of the words of these models.
PUBLISHED = {
    "tekken": [
        Split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ],
    "deepseek-coder": [
        Split("[\r\n]"), Split(r"\s?\p{L}+"), Split(r"\s?\p{P}+"), Split("[一-龥ࠀ-一가-\ud7ff]+"),
        pre_tokenizers.Digits(individual_digits=True),
    ],
    "deepseek-llm": [
        Split("[\r\n]"), Split(r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"),
        Split("\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"), Split(r"\s+$"),
        Split("[一-龥ࠀ-一가-\ud7ff]+"), pre_tokenizers.Digits(individual_digits=True),
    ],
}  # fmt: skip
ALPHABET = "aB éßǅʰ你字ひ한ࠀ0٣²Ⅷ.'!/-。“_$+\u0301\u3000\u00a0\t\r\n🎉"


@pytest.mark.parametrize("pre", PUBLISHED)
@examples(300)
@given(text=st.text(ALPHABET, max_size=24))
def test_words_are_cut_as_published(pre: str, text: str) -> None:
    published = pre_tokenizers.Sequence([*PUBLISHED[pre], LAST])
    words = [word for word, _ in published.pre_tokenize_str(text)]
    assert [word for word, _ in WORDS[pre].pre_tokenize_str(text)] == words


@pytest.mark.parametrize("pre", sorted(FAMILIES))
def test_every_family_is_reversible(pre: str, tmp_path: Path) -> None:
    tokenizer = build(tmp_path, byte_level_keys(pre))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        begins = [1] if FAMILIES[pre].add_bos else []
        assert tokenizer.encode(text) == begins + ids


def test_unknown_family_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = build(tmp_path, byte_level_keys("brand-new"))
    assert "'brand-new' is not known" in caplog.text
    assert tokenizer.decode(tokenizer.encode("hello 12")) == "hello 12"


def test_a_vocabulary_of_bytes_is_no_sentencepiece(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some files have byte-level tokens and merges, and call their tokenizer "llama"."""
    keys = byte_level_keys("gpt-2")
    scores = [0.0] * len(keys["tokenizer.ggml.tokens"])
    right = build(tmp_path, keys)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        found = build(tmp_path, keys | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores})
    assert "read as gpt2" in caplog.text
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == right.encode(text) and found.decode(ids, False) == text


OUTSIDE = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "eot": "",
    "eom": "",
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("model", ["gpt-2", "llama"])
def test_an_id_outside_the_vocabulary_is_a_warning(
    name: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = sentencepiece_keys() if model == "llama" else byte_level_keys(model)
    key = f"tokenizer.ggml.{name}_token_id"
    with caplog.at_level(logging.WARNING):
        tokenizer = build(tmp_path, keys | {key: 100_000, "tokenizer.ggml.add_bos_token": False})
    assert f"{key} is 100000, there are {len(keys['tokenizer.ggml.tokens'])} tokens" in caplog.text
    assert OUTSIDE[name] not in tokenizer.special_tokens and 100_000 not in tokenizer.eos_ids
    assert tokenizer.decode(tokenizer.encode("hello é🎉")) == "hello é🎉"


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_an_id_that_is_put_into_every_text_must_be_there(name: str, tmp_path: Path) -> None:
    wrong = {f"tokenizer.ggml.{name}_token_id": 100_000, f"tokenizer.ggml.add_{name}_token": True}
    with pytest.raises(ModelError, match=f"t.gguf: tokenizer.ggml.{name}_token_id is 100000"):
        build(tmp_path, byte_level_keys("gpt-2") | wrong)
    if name == "bos":  # by the family's custom
        with pytest.raises(ModelError, match="bos_token_id is 100000"):
            build(tmp_path, byte_level_keys("llama-bpe") | {"tokenizer.ggml.bos_token_id": 100_000})


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_flag_overrides_the_family(flag: bool, tmp_path: Path) -> None:
    for pre in ("llama-bpe", "gpt-2"):
        keys = byte_level_keys(pre, **{"tokenizer.ggml.add_bos_token": flag, "tokenizer.ggml.add_eos_token": True})
        ids = build(tmp_path, keys).encode("x")
        assert (ids[0] == 1, ids[-1] == 2) == (flag, True)


def test_user_defined_tokens_are_whole(tmp_path: Path) -> None:
    keys = byte_level_keys("gpt-2")
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "<think>"]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 4]
    tokenizer = build(tmp_path, keys)
    ids = tokenizer.encode("a<think>b")
    assert ids[1] == len(keys["tokenizer.ggml.tokens"]) - 1 and len(ids) == 3
    assert tokenizer.decode(ids) == "a<think>b"


def test_files_equal_transformers(tmp_path: Path) -> None:
    for index, keys in enumerate((byte_level_keys("llama-bpe"), byte_level_keys("qwen2"), sentencepiece_keys())):
        directory = tmp_path / str(index)
        directory.mkdir()
        built = build(directory, keys)
        built.backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        reference = transformers.AutoTokenizer.from_pretrained(directory)
        ours = Tokenizer.from_directory(directory)
        for text in TEXTS:
            ids = reference(text)["input_ids"]
            assert ours.encode(text) == built.encode(text) == ids
            assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    ByteTokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}'
    )
    assert Tokenizer.from_directory(tmp_path).eos_ids == (257, 259)  # 259 by its name
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": null}')
    tokenizer = Tokenizer.from_directory(tmp_path, eos_ids=(3,))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (259, 3))


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé🎉") == list("hé🎉".encode())
    assert tokenizer.decode(range(256)) == bytes(range(256)).decode(errors="replace")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (260, 256, (257, 259))
    assert ByteTokenizer(add_bos=True).encode("a") == [256, 97]
    rendered = tokenizer.render([{"role": "user", "content": "x"}])
    assert rendered == "<|bos|><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_text_lets_other_threads_run(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, byte_level_keys("gpt-2"))
    text = "".join(f" hello {i}" for i in range(30_000))
    began = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # another thread runs when this one lets it, and not before
    try:
        with ThreadPoolExecutor(1) as pool:
            ids = pool.submit(lambda: (began.set(), tokenizer.encode(text))[1])
            began.wait()
            assert not ids.done()
    finally:
        sys.setswitchinterval(interval)
    assert tokenizer.decode(ids.result()) == text


def test_text_that_is_not_unicode() -> None:
    tokenizer = ByteTokenizer()
    for text in ("a\ud800b", b"\xff", b"\xe4\xbd"):
        with pytest.raises(RequestError, match="not valid Unicode"):
            tokenizer.encode(text)
    assert tokenizer.encode("é".encode()) == [0xC3, 0xA9]
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\udcff"}])


def test_ids_outside_the_vocabulary_are_skipped() -> None:
    assert ByteTokenizer().decode([-1, 97, 1000, 1 << 40, 98]) == "ab"
