"""Tokens for clients: /tokenize, /detokenize, /tokenizer_info, where they find the tokenizer, and open ends."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dovetail.llm import LLM
from dovetail.server.service import Service, ServiceOptions
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.helpers import ggufs
from tests.server.serving import NAME, Running

TEXT = "hello, wörld 🎉"
ASK = [{"role": "user", "content": "hi"}]
BEGUN = [*ASK, {"role": "assistant", "content": "So we go "}]


@given(st.text(max_size=40))
@settings(max_examples=30, deadline=None)
def test_text_comes_back(shared: Running, text: str) -> None:
    tokens = shared.post("/tokenize", prompt=text).json()["tokens"]
    assert tokens == shared.llm.tokenizer.encode(text)
    found = shared.post("/detokenize", tokens=tokens).json()
    assert found == {"prompt": text, "content": text}


def test_tokenize_in_vllm_s_shape(shared: Running) -> None:
    found = shared.post("/tokenize", model=NAME, prompt=TEXT).json()
    assert found == {
        "count": len(TEXT.encode()), "max_model_len": 512, "tokens": list(TEXT.encode()), "token_strs": None
    }  # fmt: skip
    named = shared.post("/tokenize", prompt="a b", return_token_strs=True).json()
    assert named["token_strs"] == ["a", "Ġ", "b"]
    special = shared.post("/tokenize", prompt="<|im_end|>").json()["tokens"]
    assert special == [259] and shared.post("/detokenize", tokens=special).json()["prompt"] == "<|im_end|>"


def test_tokenize_a_conversation_as_a_chat_does(shared: Running) -> None:
    found = shared.post("/tokenize", messages=ASK).json()
    asked = shared.post("/v1/chat/completions", messages=ASK, max_tokens=1).json()
    assert found["count"] == asked["usage"]["prompt_tokens"] == len(shared.llm.chat_tokens(ASK))
    without = shared.post("/tokenize", messages=ASK, add_generation_prompt=False).json()["tokens"]
    assert found["tokens"][: len(without)] == without and len(without) < found["count"]


def test_tokenize_in_llama_cpp_s_shape(shared: Running) -> None:
    assert shared.post("/tokenize", content="ab").json() == {"tokens": [97, 98]}
    pieces = shared.post("/tokenize", content="aé", with_pieces=True).json()["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/tokenize", {"prompt": "x", "messages": ASK}),
        ("/tokenize", {"prompt": "x", "content": "x"}), ("/tokenize", {"prompt": "x" * ((1 << 20) + 1)}),
        ("/tokenize", {"messages": []}), ("/tokenize", {"messages": [{"role": 5}]}),
        ("/tokenize", {"content": "x", "parse_special": False}),
        ("/detokenize", {}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {"tokens": ["x"]}),
        ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [260]}),
        ("/detokenize", {"tokens": [2**63]}),
        ("/detokenize", {"tokens": [1.5]}), ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [[1]]}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(shared: Running, path: str, body) -> None:
    answer = shared.post(path, **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    assert shared.post(path, model="other", prompt="x", tokens=[]).status_code == 404


def test_tokenizer_info_has_what_evaluations_ask_for(shared: Running) -> None:
    info = httpx.get(f"{shared.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|eos|>" and info["bos_token"] == "<|bos|>"
    assert info["chat_template"] == ByteTokenizer().templates["default"]


def test_root_of_a_folder_is_the_folder(shared: Running) -> None:
    root = httpx.get(f"{shared.url}/v1/models").json()["data"][0]["root"]
    assert Path(root) == shared.llm.checkpoint.path.resolve()
    assert AutoTokenizer.from_pretrained(root)(TEXT)["input_ids"] == list(TEXT.encode())


def test_root_of_a_gguf_file_is_a_tokenizer_that_says_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    llm = LLM(ggufs.write(tmp_path / "tiny.gguf"), dtype="float32", kv_memory=1 << 20)
    service = Service(llm, ServiceOptions((NAME,)))
    root = service.root()
    loaded = AutoTokenizer.from_pretrained(root)
    assert loaded("hello 12 hell")["input_ids"] == llm.tokenizer.encode("hello 12 hell")
    ids = loaded.apply_chat_template(ASK, add_generation_prompt=True)
    assert (ids if isinstance(ids, list) else ids["input_ids"]) == llm.chat_tokens(ASK)
    assert Service(llm, ServiceOptions((NAME,))).root() == root
    assert [p.name for p in (tmp_path / "home" / "tokenizers").iterdir()] == [Path(root).name]


def test_where_no_folder_can_be_written_root_is_the_model_s_name(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    path = ggufs.write(tmp_path / "tiny.gguf")
    assert Service(LLM(path, kv_memory=1 << 20), ServiceOptions((NAME,))).root() == str(path)


def test_an_answer_goes_on_with_the_last_message(shared: Running) -> None:
    tokens = shared.post("/tokenize", messages=BEGUN, continue_final_message=True).json()["tokens"]
    assert bytes(t for t in tokens if t < 256).endswith(b"assistant\nSo we go ") and tokens[-1] == 32
    fields = {"temperature": 0, "max_tokens": 6}
    chat = shared.post("/v1/chat/completions", messages=BEGUN, continue_final_message=True, **fields).json()
    assert chat["choices"][0]["message"]["content"] == shared.text(tokens, max_tokens=6)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert shared.post("/v1/chat/completions", messages=BEGUN, **both).status_code == 400
    explicit = {"continue_final_message": True, "add_generation_prompt": False}
    again = shared.post("/v1/chat/completions", messages=BEGUN, **explicit, **fields).json()
    assert again["choices"][0]["message"] == chat["choices"][0]["message"]


def test_control_tokens_in_the_message_that_goes_on_stay_text() -> None:
    tokenizer = ByteTokenizer()
    messages = [*ASK, {"role": "assistant", "content": "<|im_end|> is"}]
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert ids[-13:] == list(b"<|im_end|> is")
    assert tokenizer.render(messages, continue_final_message=True).endswith("assistant\n<|im_end|> is")
