"""Runs a suite on one or more settings of an engine. Each setting is loaded, measured and checked."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.bench.engine.points import Prompts, measure
from dovetail.bench.verdict import Bar, decide
from dovetail.core.errors import ConfigError, DovetailError
from dovetail.core.technique import idle
from dovetail.evals.bounds import LOOKS, SPEED, Bound, decided
from dovetail.evals.journal import Journal
from dovetail.evals.paired import Paired
from dovetail.evals.suite import Result, Suite
from dovetail.provenance import commit, versions
from dovetail.setting import Setting
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.llm import LLM

TOKENS, PARTS = 16, 4  # of an answer, in parts that are timed apart
MEASURED, REFUSED, IDLE = "measured", "refused", "idle"


@dataclass(frozen=True)
class Run:
    """What to measure: `suite` on `model` at each of `settings`, against `reference` if the suite compares. The
    figures of each setting are judged by `bounds`. Answers to questions are paired with those of `earlier`, a
    result, or else of the first setting that was measured."""

    suite: Suite
    model: str
    settings: Sequence[Setting]
    reference: Setting | None = None
    bounds: Sequence[Bound] = ()
    earlier: Result | None = None

    @property
    def key(self) -> dict[str, Any]:
        """Two runs with the same key are the same run."""
        settings = [
            (s.name, s.use, sorted(vars(s.options).items())) for s in (*self.settings, self.reference) if s
        ]
        facts = {"suite": self.suite.name, **self.suite.facts, "model": self.model}
        files = [file_facts(str(value)) for value in (*self.suite.facts.values(), self.model)]
        return {**facts, "settings": settings, "files": files, "program": [versions(), commit()]}


def run(asked: Run, journal: Journal, show: Callable[[Result], None]) -> list[Result]:
    """A result for each setting, in order. Results in the journal are not measured again.

    A result has `setting` (its name), `state` and the suite's figures. `why` says why it was refused, or which
    technique was idle. `paired` says how the answers differ from those that they are paired with. `bars` has the
    decision on each bound, where there are any. A refused setting does not stop the others. `show` is called with
    each result.
    """
    results: list[Result] = []
    first = asked.earlier
    reference: Any = None
    for i, setting in enumerate(asked.settings):
        result = journal.found.get(setting.name)
        if result is None:
            if len(asked.settings) > 1:
                note(f"{i + 1}/{len(asked.settings)} {setting.name}")
            if asked.suite.compares and reference is None:
                assert asked.reference is not None
                note(f"reference: {asked.reference.name}")
                reference = _once(asked.reference, asked, lambda llm: asked.suite.refer(llm))
            result = _measure(asked, setting, reference)
            if result["state"] != REFUSED:  # the next run may find the reason gone
                journal.add(setting.name, result)
        else:
            result = {**result, "earlier": True}  # its speed was measured at another time
        if asked.suite.questions() is not None and result["state"] != REFUSED:
            result = result | _paired(first, result)
            first = first or result
        if asked.bounds and result["state"] != REFUSED:
            result = {**result, "bars": decided(asked.suite, result, asked.bounds)}
        results.append(result)
        show(result)
    return results


def _paired(first: Result | None, result: Result) -> Result:
    """What a result says about its difference from `first`, if they have questions in common."""
    if first is None:
        return {}
    pairs = Paired.of(*({item["line"]: item["correct"] for item in r["items"]} for r in (first, result)))
    return {"paired": {"to": first["setting"], "model": first["model"], **pairs.to_dict()}} if pairs.trials else {}


def file_facts(name: str) -> list[Any]:
    """Facts by which a change of the file is noticed, if `name` names a file."""
    path = Path(name).expanduser()
    try:
        found = path.stat()
    except (OSError, ValueError):
        return []
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _measure(asked: Run, setting: Setting, reference: Any) -> Result:
    start = {"setting": setting.name, "suite": asked.suite.name, "model": asked.model, "use": list(setting.use)}
    try:
        return start | _once(setting, asked, lambda llm: _figures(asked, llm, reference))
    except (ConfigError, DovetailError) as error:
        if len(asked.settings) == 1:
            raise
        return {**start, "state": REFUSED, "why": str(error), "activity": {}}


def _figures(asked: Run, llm: LLM, reference: Any) -> Result:
    """The suite's figures, and whether every technique in use acted while they were taken."""
    before = llm.activity()
    found = asked.suite.measure(llm, reference)
    activity = {name: count - before[name] for name, count in llm.activity().items()}
    names = idle(activity)
    state: Result = {"state": IDLE if names else MEASURED}
    if names:
        state["why"] = f"{', '.join(names)} never acted: these are the plain engine's figures"
    bars = [bound.bar for bound in asked.bounds if bound.key == SPEED]
    speed = decode_speed(llm, asked.suite.context(found), bars)
    return {
        **state,
        **found,
        **speed,
        "activity": activity,
        "config": llm.config.to_dict() | {"use": list(llm.config.use)},
    }


def _once(setting: Setting, asked: Run, act: Callable[[LLM], Any]) -> Any:
    """Load an engine, use it, and free its memory before the next one is loaded."""
    llm = setting.load(asked.model)
    try:
        return act(llm)
    finally:
        del llm
        gc.collect()


def decode_speed(llm: LLM, context: int, bars: Sequence[Bar] = ()) -> dict[str, Any]:
    """Decoding of one request behind `context` random tokens, or as many as the engine holds: the median, the
    lowest and the highest rate of its parts, and each part's rate. More parts are timed where `bars` on this speed
    are undecided. Nothing where the context leaves no room."""
    tokens = TOKENS * PARTS + 1
    context = min(context, llm.config.max_model_len - tokens)
    if context < 1:
        return {}
    prompts = Prompts(llm.checkpoint.config.vocab_size).take(context)
    measure(llm, [prompts[0][: min(context, 64)]], 8)  # first calls allocate
    rates: list[float] = []

    def timed(parts: int) -> list[float]:
        while len(rates) < parts:
            waits = measure(llm, prompts, tokens).waits
            rates.extend(TOKENS / sum(waits[i * TOKENS : (i + 1) * TOKENS]) for i in range(PARTS))
        return rates[:parts]

    timed(PARTS)
    for bar in bars:
        decide(bar, LOOKS, timed)
    return {
        "decode_tokens_per_s": statistics.median(rates),
        "decode_spread": [min(rates), max(rates)],
        "decode_rates": rates,
        "decode_context": context,
    }
