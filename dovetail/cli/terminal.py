"""What `run` and `chat` show besides the answer, all of it on stderr: loading, numbers, idle techniques."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import RequestError
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.cli.engine_options import EngineOptions, SamplingOptions
    from dovetail.core.sampling import SamplingParams
    from dovetail.llm import LLM
    from dovetail.outputs import RequestOutput


def load(model: str, engine: EngineOptions) -> LLM:
    """Load the model, with a line on the terminal meanwhile."""
    with status(f"loading {model}"):
        from dovetail import hub

    hub.resolve(model)  # a download shows progress of its own
    with status(f"loading {model}"):
        return engine.load(model)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show `text` on a terminal's stderr while the body runs, and remove it afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"{text} ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def chat_ids(llm: LLM, messages: Sequence[dict[str, str]], remedy: str) -> list[int]:
    """The prompt of a conversation; a model without a template gets an error that ends in `remedy`."""
    if "default" not in llm.tokenizer.templates:
        raise RequestError(f"{llm.config.model} has no chat template; {remedy}", param="messages")
    return llm.chat_tokens(messages)


def params_for(llm: LLM, ids: Sequence[int], sampling: SamplingOptions, most: int) -> SamplingParams:
    """Parameters for a prompt: unless --max-tokens says so, `most` tokens or up to the end of the context."""
    from dovetail.cli.engine_options import CONVERSATION

    params = sampling.params(llm, CONVERSATION)
    if "max_tokens" in sampling.given:
        return params
    room = max(1, llm.config.max_model_len - len(ids))  # the engine refuses a prompt that leaves no room
    return replace(params, max_tokens=max(params.min_tokens, min(most, room)))


def numbers(output: RequestOutput) -> dict[str, Any]:
    """The figures of one answer, named as in `--json`."""
    answer, metrics = output.outputs[0], output.metrics
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        "cached_tokens": output.num_cached_tokens,
        "ttft_s": metrics.ttft,
        "tokens_per_s": metrics.tokens_per_s,
        "finish_reason": answer.finish_reason,
    }


def summary(output: RequestOutput) -> str:
    """The figures of one answer as a line."""
    from dovetail.host.units import format_duration

    n = numbers(output)
    parts = [
        f"{n['prompt_tokens']} prompt tokens ({n['cached_tokens']} cached)",
        f"{n['completion_tokens']} completion tokens",
    ]
    if n["ttft_s"] is not None:
        parts.append(f"first token after {format_duration(n['ttft_s'])}")
    if n["tokens_per_s"] is not None:
        parts.append(f"{n['tokens_per_s']:.1f} tokens/s")
    return ", ".join([*parts, f"finished: {n['finish_reason']}"])


def engine_report(llm: LLM) -> str:
    """Counters of the engine since it started."""
    engine, stats = llm.engine, llm.engine.scheduler.stats
    lines = [
        f"steps: {engine.steps}, preemptions: {stats.preemptions}",
        f"prefix cache: {stats.cached_tokens} of {stats.queried_tokens} prompt tokens",
        f"KV pages: {engine.pool.num_pages - engine.pool.num_free} of {engine.pool.num_pages} hold something",
    ]
    if stats.drafted:
        lines.append(f"drafts: {stats.accepted} of {stats.drafted} tokens accepted")
        by_position = [str(n) for n in stats.accepted_at if n]
        lines.append(f"drafts accepted by position: {' '.join(by_position) or 'none'}")
    if steps := sum(stats.lengths):
        lengths = ", ".join(f"{n} of {length}" for length, n in enumerate(stats.lengths) if n)
        lines.append(
            f"tokens for each step of a request: {stats.emitted / steps:.2f} (lengths of drafts: {lengths})"
        )
    if stats.forced:
        lines.append(f"tokens that the form of the answer forced: {stats.forced}")
    if stats.failures:
        lines.append(f"failures of the drafter: {stats.failures}")
    lines += [f"{name}: acted {count} times" for name, count in llm.activity().items()]
    lines += [f"{name.replace('_', ' ')}: {total:.4g}" for name, total in llm.counters().items()]
    return "\n".join(lines)


def warn_idle(llm: LLM) -> None:
    """Say which techniques were switched on and did nothing."""
    from dovetail.core.technique import idle

    for name in idle(llm.activity()):
        note(f"{name} was in use but never acted; the result is the plain engine's")
