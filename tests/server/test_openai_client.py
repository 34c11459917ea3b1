"""The official client, unmodified."""

from __future__ import annotations

import openai
import pytest

from dovetail.core.sampling import SamplingParams
from tests.server.serving import NAME, Running

ASK = [{"role": "user", "content": "Say it."}]


@pytest.fixture(scope="module")
def client(shared: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="any", max_retries=0)


def offline(running: Running, **params) -> str:
    """What the Python API says, between two steps of the server."""
    ids = running.llm.chat_tokens(ASK)
    call = running.service.engine.call(
        lambda s: running.llm.generate(ids, SamplingParams(**params), progress=False)
    )
    return call.result(20)[0].outputs[0].text


def test_models(client: openai.OpenAI, shared: Running) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "dovetail")
    assert model.root == shared.llm.config.model and model.max_model_len == 512
    assert client.models.retrieve(NAME).id == NAME


def test_chat(client: openai.OpenAI, shared: Running) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == offline(shared, temperature=0, max_tokens=12)
    assert (choice.finish_reason, choice.message.role, answer.object) == ("length", "assistant", "chat.completion")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.id.startswith("chatcmpl-")


def test_chat_streams_the_same_text_in_order(client: openai.OpenAI) -> None:
    fields = dict(model=NAME, messages=ASK, temperature=0, max_completion_tokens=12)
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    *content, last = chunks
    assert content[0].choices[0].delta.role == "assistant" and content[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content for c in content) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in content] == [None] * (len(content) - 1) + ["length"]
    assert all("usage" not in c.model_fields_set for c in content)
    assert not last.choices and last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({c.id for c in chunks}) == 1


def test_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=ASK, max_tokens=2, stream=True))
    assert all(c.choices and "usage" not in c.model_fields_set for c in chunks)


def test_continuous_usage(shared: Running) -> None:
    answer = shared.post(
        "/v1/completions", prompt="abc", max_tokens=3, stream=True, ignore_eos=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all('"usage"' in e for e in events[:-1])


def test_usage_counts_cached_tokens(client: openai.OpenAI) -> None:
    fields = dict(model=NAME, prompt="a prompt that is seen twice, and longer than a page", max_tokens=1)
    client.completions.create(**fields)
    usage = client.completions.create(**fields).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, stream: bool) -> None:
    fields = dict(model=NAME, messages=ASK, n=3, seed=5, temperature=1.0, max_tokens=8, stream=stream)

    def texts() -> list[str]:
        if not stream:
            return [c.message.content for c in client.chat.completions.create(**fields).choices]
        out = ["", "", ""]
        for chunk in client.chat.completions.create(**fields):
            out[chunk.choices[0].index] += chunk.choices[0].delta.content
        return out

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_chat_logprobs(client: openai.OpenAI) -> None:
    fields = dict(model=NAME, messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2)
    choice = client.chat.completions.create(**fields).choices[0]
    content = choice.logprobs.content
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob <= 0
        name = bytes(entry.bytes).decode(errors="backslashreplace")
        assert entry.token == name or (not name and entry.token.startswith("<|"))
    shown = [bytes(entry.bytes) for entry in content]
    assert b"".join(shown).decode(errors="replace") == choice.message.content
    streamed = [
        entry.logprob
        for chunk in client.chat.completions.create(**fields, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == pytest.approx([entry.logprob for entry in content])


def test_completions_take_every_shape_of_prompt(client: openai.OpenAI) -> None:
    one = client.completions.create(model=NAME, prompt="hello", temperature=0, max_tokens=5).choices[0].text
    two = client.completions.create(model=NAME, prompt="world", temperature=0, max_tokens=5).choices[0].text
    ids = [list(b"hello"), list(b"world")]
    for prompt, texts in ((ids[0], [one]), (["hello", "world"], [one, two]), (ids, [one, two])):
        choices = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=5).choices
        assert [c.text for c in choices] == texts
        assert [c.index for c in choices] == list(range(len(texts)))


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    fields = dict(model=NAME, prompt="hello", temperature=0, max_tokens=3, logprobs=2, echo=True)
    choice = client.completions.create(**fields).choices[0]
    known = choice.logprobs
    assert choice.text.startswith("hello")
    assert "".join(known.tokens[:5]) == "hello" and len(known.tokens) == 8
    assert known.token_logprobs[0] is None and known.top_logprobs[0] is None
    assert known.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    for token, logprob, top in list(zip(known.tokens, known.token_logprobs, known.top_logprobs, strict=True))[1:]:
        assert logprob <= 0 and token in top and 1 <= len(top) <= 3
    streamed = list(client.completions.create(**fields, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    assert [t for c in streamed for t in c.choices[0].logprobs.tokens] == known.tokens


def test_echo_without_generation_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "hello" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == 5


def test_vllm_fields(client: openai.OpenAI) -> None:
    extra = dict(
        min_p=0.1, top_k=5, repetition_penalty=1.1, min_tokens=6, ignore_eos=True, stop_token_ids=[3],
        prompt_logprobs=1, skip_special_tokens=False, include_stop_str_in_output=True, cache_salt="s",
        add_special_tokens=False,
    )  # fmt: skip
    answer = client.completions.create(
        model=NAME, prompt="hello", max_tokens=6, logit_bias={"65": 100, "3": -100}, presence_penalty=0.5,
        frequency_penalty=0.5, top_p=0.9, seed=3, extra_body=extra,
    )  # fmt: skip
    assert answer.choices[0].text == "A" * 6
    scores = answer.choices[0].model_extra["prompt_logprobs"]
    assert scores[0] is None and str(ord("e")) in scores[1] and len(scores) == 5


def test_stop_strings(client: openai.OpenAI) -> None:
    fields = dict(model=NAME, prompt="x", max_tokens=9, logit_bias={"65": 100}, stop=["AAA", "n", "o", "p", "q"])
    choice = client.completions.create(**fields).choices[0]
    assert (choice.text, choice.finish_reason, choice.model_extra["stop_reason"]) == ("", "stop", "AAA")
    choice = client.completions.create(**fields, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert choice.text == "AAA"


def test_errors_have_the_client_s_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="another", messages=ASK)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=ASK, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    assert bad.value.body["code"] == 400
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=NAME, prompt="x" * 600)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=NAME, prompt="x", max_tokens=600, stream=True)


def test_parts_of_text_are_joined(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "it."}]}]
    joined = [{"role": "user", "content": "Say\nit."}]
    fields = dict(model=NAME, temperature=0, max_tokens=4)
    one, two = (client.chat.completions.create(messages=m, **fields) for m in (parts, joined))
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage.prompt_tokens == two.usage.prompt_tokens
