"""Finished answers as OpenAI response bodies, for the server and for batch files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.outputs import Answer, Delta
from dovetail.server import logprobs
from dovetail.server.logprobs import CompletionLogprobs, joined
from dovetail.server.params import scores_only
from dovetail.server.protocol import ChatRequest, CompletionRequest
from dovetail.text.tokenizer import Tokenizer
from dovetail.tools.message import message
from dovetail.tools.parser import Parser, PlainParser


def usage(answers: Sequence[Answer], completion_tokens: int) -> dict[str, Any]:
    """The usage object of a whole HTTP request."""
    prompt = sum(len(a.prompt_token_ids) for a in answers)
    cached = sum(max(0, a.streams[0].request.cached_tokens) for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_body(request: ChatRequest, answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    """A chat.completion without id, created and model; there is one answer."""
    (answer,) = answers
    whole = answer.whole()
    out: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [_chat_choice(request, choice, tokenizer) for choice in whole],
        "usage": usage(answers, sum(len(choice.token_ids) for choice in whole)),
    }
    if request.prompt_logprobs is not None:
        out["prompt_logprobs"] = logprobs.prompt_logprobs(answer.prompt_scores, tokenizer)
    return out


def _chat_choice(request: ChatRequest, whole: Delta, tokenizer: Tokenizer) -> dict[str, Any]:
    parser = chat_parser(whole)
    parts = [*parser.push(whole.text), *parser.finish()]
    return {
        "index": whole.choice,
        "message": message(parts),
        "logprobs": logprobs.chat_logprobs(whole, tokenizer) if request.logprobs else None,
        "finish_reason": chat_finish(whole.finish_reason, parser),
        "stop_reason": whole.stop_reason,
    }


def chat_parser(delta: Delta) -> Parser:
    """A parser of the choice that a delta belongs to."""
    use = delta.answer.tools
    return PlainParser() if use is None else use.parser()


def chat_finish(reason: str | None, parser: Parser) -> str | None:
    """Why an answer ended, with a reason of its own for complete calls."""
    return "tool_calls" if reason == "stop" and parser.calls and not parser.broken else reason


def completion_body(request: CompletionRequest, answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    """A text_completion without id, created and model. Choice i belongs to prompt i // n."""
    choices: list[dict[str, Any]] = []
    tokens = 0
    for answer in answers:
        for whole in answer.whole():
            choice = text_choice(request, whole, CompletionLogprobs(tokenizer, whole.stream.detokenizer.skipped))
            if request.prompt_logprobs is not None:
                choice["prompt_logprobs"] = logprobs.prompt_logprobs(answer.prompt_scores, tokenizer)
            choices.append(choice)
            tokens += shown_tokens(request, whole)
    return {"object": "text_completion", "choices": choices, "usage": usage(answers, tokens)}


def shown_tokens(request: CompletionRequest, delta: Delta) -> int:
    """How many of the tokens the client sees. A token that only the prompt's scores needed is not shown."""
    return 0 if scores_only(request) else len(delta.token_ids)


def text_choice(request: CompletionRequest, delta: Delta, builder: CompletionLogprobs) -> dict[str, Any]:
    """A whole choice, or its next part. If the builder is new, the part begins with the echoed prompt."""
    answer = delta.answer
    only, echo = scores_only(request), bool(request.echo) and not builder.begun
    builder.begun = True
    text = "" if only else delta.text
    prompt = _echoed(answer, builder.tokenizer) if echo else ""
    known: dict[str, Any] | None = None
    if request.logprobs is not None:
        before = builder.take_prompt(answer.prompt_token_ids, prompt, answer.prompt_scores) if echo else None
        known = builder.take([] if only else delta.logprobs)
        known = known if before is None else joined(before, known)
    return {
        "index": delta.choice,
        "text": prompt + text,
        "logprobs": known,
        "finish_reason": "length" if delta.finish_reason and only else delta.finish_reason,
        "stop_reason": None if only else delta.stop_reason,
    }


def _echoed(answer: Answer, tokenizer: Tokenizer) -> str:
    """The prompt as it was given; ids as text."""
    if answer.prompt is not None:
        return answer.prompt
    return tokenizer.decode(answer.prompt_token_ids, answer.params.skip_special_tokens)
