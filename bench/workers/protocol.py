"""What a worker is, and how it talks: one JSON object per line on stdin, one per line back on stdout.

Only the standard library, because every engine has a virtual environment of its own. A worker builds an `Engine`
and calls `serve`. Requests: `load` (once), `warm` (every figure once, so that nothing is built while the clock
runs and the fastest of several settings is chosen), `measure`, and `bandwidth` where the engine offers it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompts = list[list[int]]
Event = tuple[float, list[int]]
"""When something came (`time.perf_counter`), and how many tokens each request has by then."""
Run = Callable[[Prompts, int], Iterable[Event]]
"""Answers all prompts at once, greedily, with exactly so many tokens each."""

_PR_SET_PDEATHSIG = 1


@dataclass
class Engine:
    """A loaded engine: ways to run one request and ways to run several, each under the name of its setting."""

    single: Mapping[str, Run]
    several: Mapping[str, Run]
    facts: dict[str, Any] = field(default_factory=dict)
    bandwidth: Callable[[int, int], float] | None = None
    chosen: dict[str, str] = field(default_factory=dict)

    def ways(self, prompts: Prompts) -> Mapping[str, Run]:
        return self.single if len(prompts) == 1 else self.several


def build(ways: Mapping[str, Callable[[], Run]], setup: Mapping[str, Any]) -> dict[str, Run]:
    """The ways that are asked for by name (all, where none is named): only they take time and memory."""
    asked = setup["settings"] or list(ways)
    if unknown := [name for name in asked if name not in ways]:
        raise RuntimeError(f"no setting {unknown}; there are {list(ways)}")
    return {name: ways[name]() for name in asked}


def measure(run: Run, prompts: Prompts, tokens: int) -> dict[str, float | None]:
    """Seconds until every request has its first token; tokens per second from then until one has its last.

    Between these two all requests run, so that no engine is judged by a half-empty batch.
    """
    start = time.perf_counter()
    events = list(run(prompts, tokens))
    if not events or events[-1][1] != [tokens] * len(prompts):
        raise RuntimeError(f"asked for {tokens} tokens each, got {events[-1][1] if events else 'none'}")
    began, before = next(event for event in events if all(event[1]))
    if tokens == 1:
        return {"first": began - start, "rate": None}
    ended, after = next(event for event in events if max(event[1]) == tokens)
    if ended <= began:
        raise RuntimeError("a request ended before the last one had its first token: ask for more tokens")
    return {"first": began - start, "rate": (sum(after) - sum(before)) / (ended - began)}


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer requests until stdin closes. Whatever goes wrong ends the process with a traceback on stderr."""
    # A stopped process does not see that its stdin has closed, but this reaches it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # native libraries print to stdout too, between the answers
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "load":
            engine = load(request)
            answer: Any = engine.facts
        elif engine is None:
            raise RuntimeError(f"{op} before load")
        elif op == "warm":
            answer = _warm(engine, **request)
        elif op == "measure":
            run = engine.ways(request["prompts"])[engine.chosen[request["figure"]]]
            answer = measure(run, request["prompts"], request["tokens"])
        elif op == "bandwidth":
            asked = request["megabytes"], request["threads"]
            answer = {"gb_per_s": engine.bandwidth(*asked) if engine.bandwidth else None}
        else:
            raise RuntimeError(f"no operation '{op}'")
        print(json.dumps(answer), file=answers, flush=True)


def _warm(engine: Engine, figure: str, attempts: list[Prompts], tokens: int) -> dict[str, Any]:
    """Run a figure in every setting, once per attempt; keep the setting whose best attempt was fastest."""
    seen: dict[str, float] = {}
    ways = engine.ways(attempts[0])
    if not ways:
        raise RuntimeError(f"{figure}: none of the settings that were asked for answers several requests")
    for attempt in attempts if len(ways) > 1 else attempts[:1]:
        for name, run in ways.items():
            result = measure(run, attempt, tokens)
            speed = result["rate"] or 1 / (result["first"] or 1)
            seen[name] = max(speed, seen.get(name, 0.0))
    engine.chosen[figure] = max(seen, key=lambda name: seen[name])
    return {"chosen": engine.chosen[figure], "settings": seen}
