"""What a form costs: a decode step with and without one, in turns, and the time to compile schemas.

    .venv/bin/python bench/structured.py [MODEL] [--streams N ...] [--tokens N] [--rounds N] [--threads N] [--json]

Each stream has a schema of its own, made at random from fields that tool calls have. Its answer is a long list, so
it ends with its last token and not before. `plain` are the same prompts without a form. A round runs both, one
after the other; shown are medians over the rounds: milliseconds for a token of each stream, and their ratio;
tokens that an answer with a form gains in a step, because what must come is drafted; and what the parsers took
of a step in `drafts`, `masks` and `commit`. Schemas are compiled into an empty cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dovetail import LLM, SamplingParams, StructuredOutputs
from dovetail.structured.cache import Grammars
from dovetail.structured.compiler import Compiler
from dovetail.structured.matcher import Matcher
from dovetail.structured.vocabulary import Vocabulary

NAMES = ("name", "age", "email", "city", "street", "tags", "score", "active", "created", "price", "comment", "url")
FIELDS: list[dict[str, Any]] = [
    {"type": "string"}, {"type": "string", "maxLength": 40}, {"type": "integer"}, {"type": "number"},
    {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 120}, {"enum": ["low", "medium", "high"]},
    {"type": "array", "items": {"type": "string"}, "maxItems": 4}, {"type": "string", "format": "date"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, {"anyOf": [{"type": "string"}, {"type": "null"}]},
]  # fmt: skip


def schema(seed: int) -> dict[str, Any]:
    """A list of at least 100 objects with 4 to 8 fields."""
    chance = random.Random(seed)
    names = chance.sample(NAMES, chance.randint(4, 8))
    item = {
        "type": "object",
        "properties": {name: chance.choice(FIELDS) for name in names},
        "required": names[: len(names) - chance.randint(0, 2)],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 100}


class Timed:
    """Counts the seconds that a method takes."""

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._inner: Callable[..., Any] = getattr(Matcher, name)
        setattr(Matcher, name, lambda *arguments: self(*arguments))

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self._inner(*arguments)
        self.seconds += time.perf_counter() - start
        return found


class Run(NamedTuple):
    """Decode steps in which all streams run, and the tokens that a stream gains in them."""

    seconds: float
    steps: int
    tokens: float

    @property
    def ms(self) -> float:
        return self.seconds / self.tokens * 1e3


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> Run:
    session = llm.session
    answers = [session.submit(session.prepare(ids, p)) for ids, p in zip(prompts, params, strict=True)]
    while any(not s.token_ids for a in answers for s in a.streams):
        session.step()
    written = -sum(len(a.streams[0].token_ids) for a in answers)
    start, steps = time.perf_counter(), 0
    while not any(a.finished for a in answers):
        session.step()
        steps += 1
    seconds = time.perf_counter() - start
    for answer in answers:
        written += len(answer.streams[0].token_ids)
        if answer.error is not None or answer.streams[0].finish_reason == "stop":
            raise SystemExit(f"an answer ended too early: {answer.output()}")
        session.abort(answer)
    return Run(seconds, steps, written / len(answers))


def measure(llm: LLM, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    prompts = [
        llm.chat_tokens([{"role": "user", "content": f"List people as JSON, group {i}."}]) for i in range(streams)
    ]
    plain = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)] * streams
    forms = [
        SamplingParams(temperature=0, max_tokens=tokens, structured_outputs=StructuredOutputs(json=schema(i)))
        for i in range(streams)
    ]
    names = ("plain", "form", "ratio", "tokens", *TIMED)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        alone = run(llm, prompts, plain)
        for timed in TIMED.values():
            timed.seconds = 0.0
        formed = run(llm, prompts, forms)
        if i:  # the first compiles, and touches memory that is new
            parts = [timed.seconds / formed.steps * 1e3 for timed in TIMED.values()]
            figures = (alone.ms, formed.ms, formed.ms / alone.ms, formed.tokens / formed.steps, *parts)
            for name, value in zip(names, figures, strict=True):
                found[name].append(value)
    return {"streams": streams, **{name: statistics.median(values) for name, values in found.items()}}


def compile_times(llm: LLM, count: int) -> dict[str, float]:
    size = llm.checkpoint.config.vocab_size
    start = time.perf_counter()
    vocabulary = Vocabulary.of(llm.tokenizer, size)
    grammars = Grammars(lambda: Compiler(vocabulary))
    middle = time.perf_counter()
    grammars.compile(StructuredOutputs(choice=["a"]))
    ready = time.perf_counter()
    times, sizes = [], []
    for i in range(count):
        begin = time.perf_counter()
        sizes.append(grammars.compile(StructuredOutputs(json=schema(1000 + i))).size)
        times.append((time.perf_counter() - begin) * 1e3)
    grammars.close()
    times.sort()
    return {
        "vocabulary_ms": (middle - start) * 1e3,
        "first_ms": (ready - middle) * 1e3,
        "median_ms": times[count // 2],
        "p90_ms": times[count * 9 // 10],
        "kilobytes": statistics.median(sizes) / 1e3,
    }


TIMED = {name: Timed(name) for name in ("drafts", "masks", "commit")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="also print a line of JSON")
    args = parser.parse_args()
    llm = LLM(args.model, threads=args.threads)
    print(f"{args.model}, {llm.config.arithmetic}, {llm.config.threads} threads, {args.rounds} rounds; ms a token")
    compiled = compile_times(llm, 40)
    print("compiling, ms: " + ", ".join(f"{name} {value:.1f}" for name, value in compiled.items()))
    points = [measure(llm, n, args.tokens, args.rounds) for n in args.streams]
    for point in points:
        print("  ".join(f"{name} {value:.3f}" for name, value in point.items()))
    if args.json:
        print(
            json.dumps({"model": args.model, "threads": llm.config.threads, "compile": compiled, "points": points})
        )


if __name__ == "__main__":
    main()
