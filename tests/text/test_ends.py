"""Which tokens end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggufs import write
from vocabularies import byte_level_keys, sentencepiece_keys

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer

SILENT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def build(
    path: Path, names: dict[str, int], template: str = SILENT, **changes: Any
) -> tuple[Tokenizer, list[int]]:
    """A GGUF tokenizer whose eos key names token 0, and the ids of the tokens that were added as `names`."""
    keys = byte_level_keys("gpt-2", **{"tokenizer.chat_template": template, "tokenizer.ggml.eos_token_id": 0})
    tokens = [token if i > 2 else f"<|{i}|>" for i, token in enumerate(keys["tokenizer.ggml.tokens"])]
    count = len(tokens)
    keys["tokenizer.ggml.tokens"] = tokens + list(names)
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], *names.values()]
    keys |= changes
    total = count + len(names)
    file = write(path / "t.gguf", keys, {"token_embd.weight": np.zeros((total, 32), np.float32)})
    return build_tokenizer(GGUFFile(file), total), list(range(count, total))


NAMES = ["</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|EOT|>", "<|endoftext|>"]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_token_ends_an_answer_by_its_name(name: str, tmp_path: Path) -> None:
    tokenizer, (token,) = build(tmp_path, {name: CONTROL})
    assert tokenizer.eos_ids == (0, token)


def test_a_name_counts_where_it_is_matched_as_a_whole(tmp_path: Path) -> None:
    """Some files call the end of a turn a user's token. Ordinary text may spell a name too."""
    tokenizer, ids = build(tmp_path, {"<end_of_turn>": USER_DEFINED, "</s>": NORMAL, "<|fim|>": CONTROL})
    assert tokenizer.eos_ids == (0, ids[0])


def test_all_keys_of_a_file_count(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 2}
    assert build(tmp_path, {}, **keys)[0].eos_ids == (0, 1, 2)


TEMPLATES = {
    # what stands behind an assistant's message: whether it ends an answer
    "{{ m.content }}<|fin|>\n": True,
    "{{ m.content | trim }} <|fin|>": True,
    "{% if m.role == 'assistant' %}{{ m.content }}<|fin|>{% else %}{{ m.content }}{% endif %}": True,
    "<|fin|>{{ m.content }}\n": False,
    "{{ m.content }} and <|fin|>": False,
    "{{ raise_exception('only one message, please') }}": False,
    "{{ m.nothing.at.all }}": False,
    "hello": False,
}


@pytest.mark.parametrize("body", TEMPLATES)
def test_what_the_template_puts_after_an_assistant_ends_an_answer(
    body: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    tokenizer, (token,) = build(tmp_path, {"<|fin|>": CONTROL}, template)
    caplog.clear()
    assert tokenizer.eos_ids == ((0, token) if TEMPLATES[body] else (0,))
    assert ("the chat template ends messages with '<|fin|>'" in caplog.text) is TEMPLATES[body]
    caplog.clear()
    named, _ = build(tmp_path, {"<|fin|>": CONTROL}, template, **{"tokenizer.ggml.eot_token_id": token})
    assert named.eos_ids == (0, token) and not caplog.text


def test_the_beginning_of_a_text_is_no_end(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ bos_token }}{% endfor %}"
    assert build(tmp_path, {}, template)[0].eos_ids == (0,)


def test_the_same_holds_for_sentencepiece_and_for_folders(tmp_path: Path) -> None:
    keys = sentencepiece_keys() | {"tokenizer.ggml.eos_token_id": 3}  # the template ends answers with eos_token
    count = len(keys["tokenizer.ggml.tokens"])
    file = write(tmp_path / "t.gguf", keys, {"token_embd.weight": np.zeros((count, 32), np.float32)})
    assert build_tokenizer(GGUFFile(file), count).eos_ids == (3, 2)  # </s> by its name
    ByteTokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"
    settings = {"eos_token": "<|eos|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_directory(tmp_path, eos_ids=(7,)).eos_ids == (257, 7, 258, 259)
