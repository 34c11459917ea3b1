"""The fields of requests. Names are OpenAI's and vLLM's.

Values are typed strictly; SamplingParams checks their ranges. Fields that are not declared here are in
`model_extra`. `sort_extra` refuses those that would change the answer and are not implemented.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

from dovetail.core.errors import RequestError

TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
STRINGS = {"type": "array", "items": {"type": "string"}}


def _all(kind: type) -> AfterValidator:
    """A check that every item is exactly a `kind`. Unlike pydantic's own, it stops at the first that is not."""

    def check(values: list[Any]) -> list[Any]:
        for i, value in enumerate(values):
            if type(value) is not kind:
                raise ValueError(f"item {i} must be {_NAMES[kind]}")
        return values

    return AfterValidator(check)


_NAMES = {int: "a whole number", dict: "an object"}


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(type(v) is str for v in value)):
        return value
    raise ValueError("must be a string or a list of strings")


Prompt = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS, TOKEN_IDS, {"type": "array", "items": TOKEN_IDS}]})
]
Objects = Annotated[list[Any], _all(dict), WithJsonSchema({"type": "array", "items": {"type": "object"}})]
Stop = Annotated[Any, AfterValidator(_stop), WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS]})]
Form = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]
Ints = Annotated[list[Any], _all(int), WithJsonSchema(TOKEN_IDS)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """What both routes take. None is the same as leaving a field out."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[str, Any] | None, WithJsonSchema({"type": "object"})] = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    response_format: Form | None = None
    structured_outputs: Form | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None


class ChatRequest(GenerationRequest):
    messages: Objects
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})] = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: int | None = None
    echo: bool | None = None


# Fields that other servers act on and this one does not yet, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "priority": (None, 0),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "structural_tag": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
_REPLACED = {"functions": "tools", "function_call": "tool_choice"}
_CHAT_ONLY: Mapping[str, tuple[Any, ...]] = {"echo": (None, False)}

# Fields that say nothing about the answer.
_WITHOUT_EFFECT = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip


def sort_extra(request: GenerationRequest) -> Iterator[str]:
    """The names of fields that have no meaning here. RequestError for fields that ask for something not
    implemented."""
    unsupported = {**_UNSUPPORTED, **(_CHAT_ONLY if isinstance(request, ChatRequest) else {})}
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of other than n is not supported", param="best_of")
    for name, value in (request.model_extra or {}).items():
        if name in _REPLACED and value is not None:
            raise RequestError(f"{name} is not supported; use {_REPLACED[name]}", param=name)
        if name in unsupported:
            if not any(type(value) is type(v) and value == v for v in unsupported[name]):
                raise RequestError(f"{name}: this value is not supported yet", param=name)
        elif name not in _WITHOUT_EFFECT:
            yield name
