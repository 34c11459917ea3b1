"""From a request's fields to SamplingParams and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from dovetail.server.structured import structured_outputs

MAX_PROMPTS = 1024
MAX_SALT = 128
DEFAULT_COMPLETION_TOKENS = 16

_SAME = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "prompt_logprobs",
    "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip

_TEMPLATE_RESERVED = frozenset({
    "self", "messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template",
})  # fmt: skip

Prompt = str | list[int]
Defaults = Callable[..., SamplingParams]  # the checkpoint's own settings, with overrides


def check_common(request: GenerationRequest) -> None:
    """Check what neither the types nor SamplingParams can check."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if request.return_progress and not request.stream:
        raise RequestError("return_progress needs stream: true", param="return_progress")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if request.cache_salt is not None and not 1 <= len(request.cache_salt) <= MAX_SALT:
        raise RequestError(f"cache_salt must have 1 to {MAX_SALT} characters", param="cache_salt")


def chat_params(request: ChatRequest, defaults: Defaults) -> SamplingParams:
    """The parameters of a chat request. Without a limit an answer may fill the context."""
    if request.add_special_tokens:
        raise RequestError("chat templates write the special tokens themselves", param="add_special_tokens")
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
        if logprobs < 0:
            raise RequestError(f"top_logprobs must be at least 0, got {logprobs}", param="top_logprobs")
    elif request.top_logprobs is not None and request.top_logprobs != 0:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return defaults(**_given(request), max_tokens=request.limit, logprobs=logprobs)


def completion_params(request: CompletionRequest, defaults: Defaults) -> SamplingParams:
    """The parameters of a completion. With `echo`, `max_tokens: 0` is allowed: one token is generated and
    dropped."""
    given = _given(request)
    limit = DEFAULT_COMPLETION_TOKENS if request.limit is None else request.limit
    if scores_only(request):
        limit = 1
        given.pop("min_tokens", None)
    if request.echo and request.logprobs is not None:
        given["prompt_logprobs"] = max(request.logprobs, given.get("prompt_logprobs", 0))
    return defaults(**given, max_tokens=limit, logprobs=request.logprobs)


def scores_only(request: CompletionRequest) -> bool:
    """Whether the client wants only the prompt back, with its scores."""
    return bool(request.echo) and request.limit == 0


def _given(request: GenerationRequest) -> dict[str, Any]:
    given = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    form = structured_outputs(request)
    return given if form is None else given | {"structured_outputs": form}


def prompts(value: Any) -> list[Prompt]:
    """One prompt or several: a string, a list of strings, a list of token ids, a list of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise RequestError("prompt must be a string, strings, or token ids, and not empty", param="prompt")
    if _all(value, int):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise RequestError(f"at most {MAX_PROMPTS} prompts at a time, got {len(value)}", param="prompt")
    if _all(value, str) or (_all(value, list) and all(_all(ids, int) for ids in value)):
        return value
    raise RequestError("prompt mixes types; give strings only, or token ids only", param="prompt")


def _all(values: Sequence[Any], kind: type) -> bool:
    return all(type(v) is kind for v in values)


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the request adds to the chat template's context."""
    variables = request.chat_template_kwargs or {}
    if taken := sorted(_TEMPLATE_RESERVED & variables.keys()):
        raise RequestError(f"chat_template_kwargs cannot set {taken[0]}", param="chat_template_kwargs")
    return variables
