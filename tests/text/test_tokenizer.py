"""Encoding and decoding: GGUF vocabularies, Hugging Face files, errors."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from ggufs import write
from vocabularies import CONTROL, PIECES, TEXTS, byte_level_keys, sentencepiece_keys, sentencepiece_reference

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import FAMILIES, build_tokenizer
from dovetail.core.errors import RequestError
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer


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
    "llama-bpe": [("1212", ["12", "1", "2"]), ("wor12", ["w", "or", "12"]), ("!\n", ["!Ċ"])],
    "qwen2": [("1212", ["1", "2", "1", "2"]), ("!\n", ["!Ċ"])],
    "gpt-2": [("1212", ["12", "12"]), ("!\n", ["!", "Ċ"]), ("x'll", ["x", "'ll"])],
    "smollm": [("1212", ["1", "2", "1", "2"]), ("!\n", ["!", "Ċ"])],
    "gpt-4o": [("Ab", ["Ab"]), ("bCa", ["b", "Ca"])],
    "tekken": [("12", ["1", "2"]), ("x'll", ["x", "'", "ll"])],
}


@pytest.mark.parametrize("pre", CUTS)
def test_word_cuts(pre: str, tmp_path: Path) -> None:
    tokenizer = build(tmp_path, byte_level_keys(pre))
    for text, pieces in CUTS[pre]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.backend.id_to_token(token) for token in ids] == pieces or text in ("1212", "x'll")
        assert tokenizer.decode(ids) == text


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
    assert Tokenizer.from_directory(tmp_path).eos_ids == (257,)
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
