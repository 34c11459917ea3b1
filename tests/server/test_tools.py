# ruff: noqa: E501 (texts of models are not wrapped)
"""Tools through the official client: whole and streamed, fed back, and refused where they are malformed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail.core.sampling import SamplingParams
from dovetail.outputs import Delta
from dovetail.server.chat import Chat
from dovetail.server.errors import Failure
from dovetail.server.exchange import Reply
from dovetail.server.job import Job
from dovetail.server.protocol import ChatRequest
from dovetail.server.service import LARGE_BODY
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.server.serving import NAME, Running, Scripted, save_tiny, writing

ASK: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "description": None}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with room for prompts that describe tools in bytes."""
    running = Running(save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096))
    yield running
    running.check_empty()
    running.stop()


@pytest.fixture(scope="module")
def client(shared: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="any", max_retries=0)


def whole(client: openai.OpenAI, **fields: Any) -> tuple[str | None, list[tuple[str, str]], str]:
    (choice,) = client.chat.completions.create(
        **{"model": NAME, "messages": ASK, "tools": [WEATHER, CLOCK], "max_tokens": 400, **fields}
    ).choices
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    return choice.message.content, calls, choice.finish_reason


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[str | None, list[tuple[str, str]], str]:
    """What the deltas of a stream add up to; they are checked on the way."""
    content, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(
        **{"model": NAME, "messages": ASK, "tools": [WEATHER, CLOCK], "max_tokens": 400, "stream": True, **fields}
    ):
        (choice,) = chunk.choices
        assert not reasons, "something came behind the finish reason"
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                assert call.id and call.type == "function" and call.function.name
                calls.append([call.function.name, ""])
            else:
                assert call.index == len(calls) - 1 and call.id is None and call.function.name is None
            calls[call.index][1] += call.function.arguments
        if choice.finish_reason:
            reasons.append(choice.finish_reason)
    return content or (None if calls else ""), [(n, a) for n, a in calls], reasons[0]


ANSWERS = {
    CALL: (None, [("get_weather", '{"city": "Zürich"}')], "tool_calls"),
    f"I look.\n{CALL}\n{CLOCK_CALL}": (
        "I look.", [("get_weather", '{"city": "Zürich"}'), ("get_time", "{}")], "tool_calls",
    ),
    "It is sunny.": ("It is sunny.", [], "stop"),
    "": ("", [], "stop"),
    '<tool_call>\n{"name": "get_weather", "arguments": {city}}\n</tool_call>': (
        '<tool_call>\n{"name": "get_weather", "arguments": {city}}\n</tool_call>', [], "stop",
    ),
    '<tool_call>\n{"name": "get_weather", "argum': ('<tool_call>\n{"name": "get_weather", "argum', [], "stop"),
    '{"name": "get_weather", "parameters": {"city": "Oslo"}}': (
        None, [("get_weather", '{"city": "Oslo"}')], "tool_calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_calls_and_what_is_none(client: openai.OpenAI, shared: Running, text: str) -> None:
    with writing(shared, text):
        assert whole(client) == ANSWERS[text]
        assert streamed(client) == ANSWERS[text]


PIECES = st.lists(
    st.sampled_from([CALL, CLOCK_CALL, "<tool_call>", '{"name": "get_time", "arguments": {}}', "ü", "\n", "</tool_call>", "[", "```json\n", "```"]),
    max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=PIECES, limit=st.integers(1, 300), parallel=st.booleans())
def test_a_stream_says_what_the_whole_says(
    client: openai.OpenAI, shared: Running, text: str, limit: int, parallel: bool
) -> None:
    with writing(shared, text):
        fields = {"max_tokens": limit, "parallel_tool_calls": parallel}
        assert streamed(client, **fields) == whole(client, **fields)


def test_an_error_that_comes_with_a_part_of_a_call_is_told(shared: Running) -> None:
    """Nothing of the call is shown yet, so there is no event that could say how long it took."""

    class Written(Reply):
        def __init__(self) -> None:
            self.events: list[bytes] = []

        async def open_stream(self) -> None:
            pass

        async def write(self, data: bytes) -> None:
            self.events.append(data)

    async def stream() -> None:
        service, written = shared.service, Written()
        chat = Chat(service)
        chat.request = ChatRequest(messages=ASK, tools=[WEATHER], stream=True)
        chat.head = {}
        answers = service.intake.answers(service.intake.read(chat.request), "some")
        job = Job(answers, True, 0.0)
        job.put(Delta(answers[0], 0, "<tool_call>", [60], [], None, None, 0.0))
        parts = asyncio.ensure_future(chat.stream(job, written))
        while not written.events:  # the role
            await asyncio.sleep(0)
        job.put(Delta(answers[0], 0, "{", [61], [], None, None, 0.0))
        job.fail(Failure("the engine has failed"))
        with pytest.raises(Failure, match="the engine has failed"):
            await parts

    asyncio.run(stream())


def test_schemas_of_a_large_body_are_checked_beside_the_event_loop(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    read = shared.service.intake.read
    monkeypatch.setattr(
        shared.service.intake, "read", lambda r: (names.append(threading.current_thread().name), read(r))[1]
    )
    for size in (10, LARGE_BODY):
        tool = {"type": "function", "function": {"name": "f", "description": "x" * size}}
        shared.post("/v1/chat/completions", messages=ASK, tools=[tool], max_tokens=1)
    small, large = names
    assert large.startswith("dovetail-bulk") and not small.startswith("dovetail-bulk")


def test_a_call_that_the_limit_cuts_is_text(client: openai.OpenAI, shared: Running) -> None:
    with writing(shared, CALL):
        assert whole(client, max_tokens=30) == (CALL[:30], [], "length")
        assert streamed(client, max_tokens=30) == (CALL[:30], [], "length")


def test_choices_have_calls_and_log_probabilities_of_their_own(client: openai.OpenAI, shared: Running) -> None:
    with writing(shared, CALL):
        fields: Any = dict(model=NAME, messages=ASK, tools=[WEATHER], max_tokens=200, n=2, logprobs=True, seed=1)
        answer = client.chat.completions.create(**fields)
        assert [c.finish_reason for c in answer.choices] == ["tool_calls"] * 2
        ids = [c.message.tool_calls[0].id for c in answer.choices]
        assert len(set(ids)) == 2
        tokens: dict[int, list[str]] = {0: [], 1: []}
        for chunk in client.chat.completions.create(**fields, stream=True):
            for choice in chunk.choices:
                tokens[choice.index] += [e.token for e in (choice.logprobs.content if choice.logprobs else [])]
    for choice in answer.choices:
        assert tokens[choice.index] == [e.token for e in choice.logprobs.content]
        assert len(tokens[choice.index]) == len(CALL.encode()) + 1


def test_a_result_is_fed_back(client: openai.OpenAI, shared: Running) -> None:
    """The client's own message goes back as it came, and the template, which knows no tools, shows all of it."""
    with writing(shared, CALL) as scripted:
        message = (
            client.chat.completions.create(model=NAME, messages=ASK, tools=[WEATHER], max_tokens=200)
            .choices[0]
            .message
        )
        asked = text_of(shared, scripted)
        assert '"name": "get_weather", "description": "Weather of a city"' in asked and "<tool_call>" in asked
        assert asked.index("system") < asked.index("get_weather") < asked.index("Weather?")
        result: Any = {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "content": [{"type": "text", "text": "21 °C"}],
        }
        scripted.text = "It is 21 °C."
        again = client.chat.completions.create(
            model=NAME, messages=[*ASK, message, result], tools=[WEATHER], max_tokens=200
        )
        assert again.choices[0].message.content == "It is 21 °C."
        assert text_of(shared, scripted).endswith(
            f"assistant\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n21 °C\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )  # fmt: skip


def text_of(running: Running, scripted: Scripted) -> str:
    return running.llm.tokenizer.decode(scripted.prompt, skip_special_tokens=False)


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None}, {"tool_choice": "none"}])
def test_without_tools_a_call_is_text(client: openai.OpenAI, shared: Running, fields: dict[str, Any]) -> None:
    with writing(shared, CALL) as scripted:
        assert whole(client, **fields) == (CALL, [], "stop")
        assert "get_weather" not in text_of(shared, scripted)
        assert streamed(client, **fields) == (CALL, [], "stop")


def test_python_says_what_http_says(client: openai.OpenAI, shared: Running) -> None:
    with writing(shared, f"I look.\n{CALL}") as scripted:
        expected = client.chat.completions.create(model=NAME, messages=ASK, tools=[WEATHER], max_tokens=200)
        prompt = scripted.prompt
        params = SamplingParams(max_tokens=200)
        call = shared.service.engine.call(
            lambda s: shared.llm.chat(ASK, params, tools=[WEATHER], tool_choice="auto", progress=False)
        )
        (output,) = call.result(20)[0].outputs
        assert scripted.prompt == prompt
    assert output.text == f"I look.\n{CALL}"
    message = expected.choices[0].message
    assert output.message["content"] == message.content == "I look."
    assert output.message["tool_calls"][0]["function"] == message.tool_calls[0].function.model_dump()


def test_tools_reach_a_template_that_takes_them(start: Any) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.templates["default"] = (
        "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS][{{ c.function | tojson }}]{% endfor %}{% endfor %}"
    )
    running = start(tokenizer=tokenizer)
    own = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
    with writing(running, '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]') as scripted:
        assert whole(own, tools=[CLOCK], max_tokens=100) == (None, [("get_time", "{}")], "tool_calls")
        shown = {**CLOCK["function"], "description": "", "parameters": {"type": "object", "properties": {}}}
        assert (
            text_of(running, scripted)
            == f"[{json.dumps({'type': 'function', 'function': shown})}]<|im_start|>Weather?"
        )


NAMED = {"type": "function", "function": {"name": "get_weather"}}
DEEP: dict[str, Any] = {}
for _ in range(80):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [3]}, "tools"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 200}}]}, "tools[0].function.name"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1]"),
        ({"tools": [CLOCK] * 1000}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 3}}]}, "tools[0].function.description"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        *(
            ({"tools": [{"type": "function", "function": {"name": "f", "parameters": p}}]}, "tools[0].function.parameters")
            for p in ([], "x", {"type": "array"}, {"type": "strange"}, {"properties": []}, {"properties": {"a": {"type": "strange"}}},
                      {"properties": {"a": 3}}, {"required": "a"}, {"required": [3]}, {"properties": {"a": {"enum": 3}}},
                      {"properties": {"a": {"anyOf": {}}}}, {"properties": {"a": {"items": 3}}}, {"properties": {"a": DEEP}})
            if p != []
        ),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"functions": [CLOCK["function"]]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
)  # fmt: skip
def test_malformed_tools_are_refused(shared: Running, fields: dict[str, Any], param: str) -> None:
    answer: httpx.Response = shared.post(
        "/v1/chat/completions", **{"messages": ASK, "tools": [CLOCK], "max_tokens": 1, **fields}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_choice_that_asks_for_no_call_needs_no_tools(shared: Running, choice: Any) -> None:
    answer = shared.post(
        "/v1/chat/completions", messages=ASK, max_tokens=1, tool_choice=choice, parallel_tool_calls=True
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_follow_their_schemas(client: openai.OpenAI, choice: Any, parallel: bool) -> None:
    """Even the random model makes them, streamed as it goes."""
    city = {"type": "string", "enum": ["Oslo", "Zürich"]}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}, CLOCK]
    for seed in range(4):
        fields = dict(tools=tools, tool_choice=choice, parallel_tool_calls=parallel, seed=seed)
        content, calls, reason = whole(client, **fields)
        assert streamed(client, **fields) == (content, calls, reason)
        assert reason in ("tool_calls", "length") and (calls or reason == "length")
        for name, arguments in calls if reason == "tool_calls" else []:
            assert name in ("get_weather", "get_time")
            assert json.loads(arguments).get("city", "Oslo") in ("Oslo", "Zürich")
        if choice == NAMED or not parallel:
            assert len(calls) == 1


def test_a_required_call_that_the_limit_cuts(client: openai.OpenAI) -> None:
    fields: Any = dict(tools=[CLOCK], tool_choice="required", seed=0)
    begun = len('<tool_call>\n{"name": "get_time", "arguments": ')
    for limit in (1, 20, begun + 1, begun + 2):
        content, calls, reason = whole(client, **fields, max_tokens=limit)
        assert streamed(client, **fields, max_tokens=limit) == (content, calls, reason)
        assert reason == "length" and (content or "") == (CLOCK_CALL[:limit] if limit < begun else "")
        assert [name for name, _ in calls] == ["get_time"] * (limit > begun)
        assert all(len(arguments) == limit - begun and arguments.startswith("{") for _, arguments in calls)


def test_required_calls_and_another_form_exclude_each_other(shared: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for fields, param in (
        ({"tool_choice": "required", "response_format": form}, "tool_choice"),
        ({"structured_outputs": {"regex": "a+"}}, "tools"),
    ):
        answer = shared.post("/v1/chat/completions", messages=ASK, tools=[CLOCK], max_tokens=1, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_schema_that_cannot_be_compiled_is_refused(shared: Running) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "(?<!x)y"}},
        "required": ["a"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = shared.post("/v1/chat/completions", messages=ASK, tools=tools, max_tokens=1, tool_choice="required")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools"), answer.text
    answer = shared.post("/v1/chat/completions", messages=ASK, tools=tools, max_tokens=1)
    assert answer.status_code == 200, answer.text
