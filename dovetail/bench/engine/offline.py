"""Throughput on a file of prompts that are submitted at once, with one setting of an engine or two in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dovetail.bench.engine import prompt_file
from dovetail.bench.engine.points import exercise
from dovetail.bench.engine.prompt_file import Line
from dovetail.bench.engine.side import Side, result
from dovetail.bench.rounds import in_turns
from dovetail.core.errors import ConfigError, DovetailError
from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from dovetail.session import token_ids
from dovetail.setting import Setting
from dovetail.show.progress import Advance, counter

SHOWN_LINES = 5  # how many of the lines that cannot be used are shown


@dataclass(frozen=True)
class Asked:
    """What to measure. params: how an engine samples a prompt whose line does not say."""

    model: str
    settings: Sequence[Setting]
    source: Path
    rounds: int
    params: Callable[[LLM, Sequence[int]], SamplingParams]
    limit: int | None = None


@dataclass(frozen=True)
class Job:
    """A prompt, and how it is answered."""

    ids: list[int]
    params: SamplingParams


@dataclass
class Work:
    """The jobs of a file; the lines that are not jobs, by number, with the reason; and unknown fields."""

    jobs: list[Job] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)


def run(asked: Asked) -> dict[str, Any]:
    """The result as plain data. ConfigError if no line of the file can be used."""
    if next(prompt_file.read(asked.source), None) is None:  # checked before a model is loaded
        raise ConfigError(f"{asked.source}: there is no prompt in it")
    sides = [Side(setting, asked.model) for setting in asked.settings]
    work = _work(asked, [side.llm for side in sides])
    for side in sides:
        with side.running():
            exercise(side.llm)
    with counter("answers", asked.rounds * len(sides) * len(work.jobs)) as advance:
        for number in range(asked.rounds):
            for side in in_turns(sides, number):
                with side.running(), side.watched():
                    _take(side, work.jobs, advance)
    facts = {"input": str(asked.source), "requests": len(work.jobs), "rounds": asked.rounds}
    first = [{"line": number, "error": why} for number, why in list(work.broken.items())[:SHOWN_LINES]]
    facts["broken"] = {"count": len(work.broken), "first": first}
    return {**result(asked.model, sides), **facts, "unknown_fields": sorted(work.unknown)}


def _work(asked: Asked, llms: Sequence[LLM]) -> Work:
    """Up to `limit` jobs that every engine takes."""
    work = Work()
    for line in prompt_file.read(asked.source):
        if len(work.jobs) == asked.limit:
            break
        try:
            job = _job(asked, line, llms[0])
            for llm in llms:
                _admit(llm, job)
        except DovetailError as error:
            work.broken[line.number] = str(error)
        else:
            work.jobs.append(job)
            work.unknown.update(line.unknown)
    if not work.jobs:
        first = next((f"; line {number}: {why}" for number, why in work.broken.items()), "")
        raise ConfigError(f"{asked.source}: no line can be used, {len(work.broken)} are broken{first}")
    return work


def _job(asked: Asked, line: Line, llm: LLM) -> Job:
    if line.error is not None:
        raise line.error
    if line.messages is not None:
        ids = llm.chat_tokens(line.messages)
    else:
        ids = llm.tokenizer.encode(line.prompt) if isinstance(line.prompt, str) else token_ids(line.prompt)
    params = asked.params(llm, ids)
    return Job(ids, params if line.max_tokens is None else replace(params, max_tokens=line.max_tokens))


def _admit(llm: LLM, job: Job) -> None:
    """Raise what submitting the job would raise."""
    session = llm.session
    session.abort(session.submit(session.prepare(job.ids, job.params)))


def _take(side: Side, jobs: Sequence[Job], advance: Advance) -> None:
    """Answer all jobs. The prefix cache is empty at the start."""
    llm, stats = side.llm, side.llm.engine.scheduler.stats
    llm.engine.scheduler.reuse.evict(llm.config.num_kv_pages)
    before = replace(stats)
    start = time.perf_counter()
    answers = [llm.session.submit(llm.session.prepare(job.ids, job.params)) for job in jobs]
    batches: list[int] = []
    while llm.session.busy:
        advance(sum(delta.last for delta in llm.session.step()))
        batches.append(len(llm.engine.last_plan.spans))
    seconds = time.perf_counter() - start
    prompt, output = sum(len(job.ids) for job in jobs), sum(len(a.streams[0].token_ids) for a in answers)
    figures = {
        "requests_per_s": len(jobs) / seconds,
        "prompt_tokens_per_s": prompt / seconds,
        "output_tokens_per_s": output / seconds,
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "mean_batch": statistics.mean(batches),
        "cached_tokens": stats.cached_tokens - before.cached_tokens,
        "preemptions": stats.preemptions - before.preemptions,
        "failed": sum(answer.error is not None for answer in answers),
    }
    for name, reading in figures.items():
        side.read((name,), reading)
