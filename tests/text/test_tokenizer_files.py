"""Hugging Face folders whose files disagree, beside what transformers makes of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dovetail.core.errors import ModelError
from dovetail.text.detokenizer import BYTE_ALPHABET
from dovetail.text.tokenizer import Tokenizer
from dovetail.text.tokenizer_files import TEKKEN

TEXTS = ["<|user|>x<|end|>", "a <|user|> b<think>c</think>", "<pad><new>x <new>", "plain", "<|end|>\n <|user|>y"]


def save(directory: Path, settings: dict[str, Any], added: list[AddedToken] | None = None) -> Path:
    """A byte-level vocabulary that holds the tokens of `TEXTS`, of which only `added` are matched as a whole."""
    vocabulary = dict(BYTE_ALPHABET)
    for text in ("<|end|>", "<|user|>", "<think>", "</think>", "<pad>"):
        vocabulary[text] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in added or [] if token.special])
    backend.add_tokens([token for token in added or [] if not token.special])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def listed(content: str, **flags: bool) -> dict[str, Any]:
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return {"content": content} | dict.fromkeys(names, False) | flags


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **listed(content, special=True)}


USER, END, THINK = "<|user|>", "<|end|>", "<think>"
SPECIAL_USER = listed(USER, special=True)
FOLDERS: dict[str, tuple[dict[str, Any], list[AddedToken]]] = {
    "listed in tokenizer_config.json only": (
        {"eos_token": END, "added_tokens_decoder": {"256": listed(END, special=True), "257": SPECIAL_USER}}, [],
    ),
    "named only": ({"eos_token": END, "pad_token": typed("<pad>")}, []),
    "in a list": ({"additional_special_tokens": [USER, typed(END)]}, []),
    "in another list": ({"extra_special_tokens": [USER]}, []),
    "not special": ({"added_tokens_decoder": {"258": listed(THINK), "259": listed("</think>")}}, []),
    "with spaces": ({"added_tokens_decoder": {"257": listed(USER, special=True, lstrip=True, rstrip=True)}}, []),
    "other flags than in tokenizer.json": (
        {"added_tokens_decoder": {"257": listed(USER, special=True, rstrip=True)}},
        [AddedToken(USER, special=False, normalized=False)],
    ),
    "a new token": ({"added_tokens_decoder": {"261": listed("<new>", special=True)}}, []),
    "new tokens in another order": (
        {"added_tokens_decoder": {"262": listed("<new>"), "261": listed("<old>", special=True)}}, [],
    ),
    "the same": (
        {"added_tokens_decoder": {"257": SPECIAL_USER}}, [AddedToken(USER, special=True, normalized=False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_tokens_that_tokenizer_json_does_not_list(case: str, tmp_path: Path) -> None:
    directory = save(tmp_path, *FOLDERS[case])
    ours, theirs = Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }


@pytest.mark.parametrize("token", [5, 300])
def test_a_token_with_another_id_is_named(token: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"added_tokens_decoder": {str(token): listed(END, special=True), "400": listed("<new>")}})
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_directory(tmp_path)
    assert f"'<|end|>' is token {token}, tokenizer.json has it at 256" in caplog.text
    assert "'<new>' is token 400, tokenizer.json does not have it there" in caplog.text
    assert tokenizer.vocab_size == 261 and not tokenizer.special_ids


@pytest.mark.parametrize("value", [{"257": "x"}, {"257": {}}, {"x": listed(USER)}, {"257": {"content": 5}}])
def test_what_is_no_token_is_refused(value: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, {"added_tokens_decoder": value})
    with pytest.raises(ModelError, match=r"tokenizer_config.json: added_tokens_decoder"):
        Tokenizer.from_directory(tmp_path)


SPM = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def test_a_decoder_of_another_kind_is_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save(tmp_path, {})
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    for decoder in (decoders.Sequence(SPM), decoders.Metaspace(), None):
        if decoder is not None:
            backend.decoder = decoder
        backend.save(str(directory / "tokenizer.json"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokenizer = Tokenizer.from_directory(directory)
        text = "héllo\n 你好 🎉"
        assert tokenizer.decode(tokenizer.encode(text)) == text and "its tokens spell bytes" in caplog.text


def test_vocabularies_that_only_look_like_bytes_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    letters = {char: i for i, char in enumerate([*BYTE_ALPHABET, "\u2581"])}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(SPM[:3])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Ġé x")) == "Ġé x" and not caplog.text


def test_word_cuts_that_are_not_those_of_mistral_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = {**BYTE_ALPHABET, "[INST]": 256} | {f"<{i}>": i for i in range(257, 100_001)}
    for regex, warned in ((TEKKEN, False), (r"\p{N}{1,3}|\p{L}+", True)):
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        backend.save(str(tmp_path / "tokenizer.json"))
        caplog.clear()
        Tokenizer.from_directory(tmp_path)
        assert ("other words" in caplog.text) is warned
