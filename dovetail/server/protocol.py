"""The fields of requests. Names are OpenAI's and vLLM's.

Values are typed strictly, but for numbers: 5.0 and "5" are 5, as for other servers. SamplingParams checks their
ranges. Fields that are not declared here are in `model_extra`. `sort_extra` refuses those that would change the
answer and are not implemented.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

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


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _bias(value: dict[str, Any]) -> dict[str, Any]:
    return {token: float(bias) if isinstance(bias, str) else bias for token, bias in value.items()}


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(type(v) is str for v in value)):
        return value
    raise ValueError("must be a string or a list of strings")


Int = Annotated[int, Field(strict=False), BeforeValidator(_number)]
Float = Annotated[float, Field(strict=False), BeforeValidator(_number)]
Bias = Annotated[dict[str, Any], AfterValidator(_bias), WithJsonSchema({"type": "object"})]
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
    n: Int | None = None
    best_of: Int | None = None
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    seed: Int | None = None
    stop: Stop = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    logit_bias: Bias | None = None
    prompt_logprobs: Int | None = None
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
    return_progress: bool | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, under either of its two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatRequest(GenerationRequest):
    messages: Objects
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})] = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: Int | None = None
    echo: bool | None = None


# Fields that other servers act on and this one does not yet, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
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

# What other programs call the limit of an answer. Ignored, it would cost an answer as long as the context.
_LIMITS = frozenset({
    "max_gen_len", "max_length", "max_new_tokens", "max_output_tokens", "max_tokens_to_sample", "n_predict",
    "num_predict",
})  # fmt: skip
_SPELLED = ("maxtokens", "maxcompletiontokens")


def sort_extra(request: GenerationRequest) -> Iterator[str]:
    """The names of fields that have no meaning here. RequestError for fields that ask for something not
    implemented, and for a limit under a name that is not known here."""
    unsupported = {**_UNSUPPORTED, **(_CHAT_ONLY if isinstance(request, ChatRequest) else {})}
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of other than n is not supported", param="best_of")
    for name, value in (request.model_extra or {}).items():
        if name in _REPLACED and value is not None:
            raise RequestError(f"{name} is not supported; use {_REPLACED[name]}", param=name)
        if name in unsupported:
            if not any(isinstance(value, bool) == isinstance(v, bool) and value == v for v in unsupported[name]):
                raise RequestError(f"{name}: this value is not supported yet", param=name)
        elif value is not None and _is_limit(name):
            raise RequestError(f"{name} is not a field here; the limit of an answer is max_tokens", param=name)
        elif name not in _WITHOUT_EFFECT:
            yield name


def _is_limit(name: str) -> bool:
    """Whether a field that is not known here must mean max_tokens."""
    plain = "".join(c for c in name[:64].lower() if c.isalpha())
    return name in _LIMITS or bool(difflib.get_close_matches(plain, _SPELLED, n=1, cutoff=0.88))
