"""Loss and speed of the paper's formats, as `dovetail advise` measures them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.advise.advice import Timing
from dovetail.advise.candidates import Candidate
from dovetail.advise.run import SPARE, STEPS, Advised, Asked, Tried, run
from dovetail.bench.rounds import Ratio, by_round
from dovetail.evals.journal import Journal
from dovetail.options import Options
from dovetail.reproduce.bf16.effort import Effort
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quantized import Models
from dovetail.setting import Setting

RECOVERY = "what is kept"
PLAIN = "bf16"
_KEPT = {  # the paper's averages of benchmarks, Llama-3.1-8B, in % of bf16's
    "w8a8-fp8": "99.3 %",
    "w8a8-int8": "100.3 %",
    "w4a16": "98.7 %",
}
_SPEEDS = {  # by whether one stream is served
    True: "one stream is bound by reading weights, and W4A16 wins: cost 2.39 times lower (8B, A6000), 2.67 (70B, "
    "A100)",
    False: "many streams are bound by arithmetic, and 8 bits for both win: INT8 1.38 times and INT4 1.08 times "
    "bf16's throughput (8B, A6000), 1.87 and 1.64 (70B, A100), FP8 1.77 and INT4 1.55 (70B, H100)",
}
_WHY = {
    True: "A step of one stream reads all weights for one row. The output head stays in bf16, which limits what a "
    "small model gains.",
    False: "int8 has units of its own here. 4-bit weights take its instructions too, twice for rows of 16 bits. "
    "fp8 has no units on this CPU and is multiplied as bfloat16.",
}


def experiment(effort: Effort) -> Experiment:
    names = [_name(workload.name) for workload in effort.workloads]
    return Experiment("formats", (RECOVERY, *names), partial(measure, effort))


def _name(workload: str) -> str:
    return f"the best format, {workload}"


def measure(effort: Effort) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        made = Models(effort.model, effort.text, Path(folder), rescaled=True)
        recipes: Mapping[str, Mapping[str, Any]] = {
            "w8a8-fp8": {}, "w8a8-int8": {}, "w4a16": {"group": effort.group}
        }  # fmt: skip
        paths = {PLAIN: made.source} | {name: made.quantized(name, name, given) for name, given in recipes.items()}
        timed = effort.rounds * STEPS + SPARE
        needs = (max(w.longest, w.context + timed) for w in effort.workloads)
        options = Options(max_model_len=max(effort.text.window, *needs))
        asked = Asked(
            [Candidate(name, path, Setting(name, options=options)) for name, path in paths.items()],
            effort.workloads, str(made.file), None, effort.text.windows, effort.rounds, most=1.0,
        )  # fmt: skip
        tried, advised = run(asked, Journal({"reproduce": folder}))
        setting = f"{effort.model} rescaled off its grid, GPTQ for int8 and for 4 bits in groups of {effort.group}"
        yield _recovery(f"{setting}, {made}", tried)
        for found in advised:
            yield _best(f"{setting}; {found.workload}", found)


def _recovery(setting: str, tried: Sequence[Tried]) -> Claim:
    first, *others = [(one.name, one.loss) for one in tried if one.loss is not None]
    assert first[1] is not None
    losses = ", ".join(f"{name} {loss.beyond(first[1]):+.1%}" for name, loss in others if loss is not None)
    kept = ", ".join(f"{name} {share}" for name, share in _KEPT.items())
    return Claim(
        RECOVERY,
        setting,
        f"averages of benchmarks, Llama-3.1-8B, of bf16's: {kept} (groups of 128)",
        f"perplexity {first[1].perplexity:.2f} of bf16: {losses}",
        "Benchmarks count answers and hide small changes; perplexity counts every token. And a model of 135 "
        "million weights loses more than one of 8 billion, with 4 bits most of all.",
    )


def _best(setting: str, found: Advised) -> Claim:
    """Formats ranked by the predicted time of the workload."""
    alone = found.workload.concurrency == 1
    seconds = {name: timing.predicted(found.workload) for name, timing in found.timings.items()}
    best = min(seconds, key=lambda name: seconds[name])
    ratios = [f"{name} {seconds[PLAIN] / s:.2f}" for name, s in seconds.items() if name != PLAIN]
    timings = found.timings
    rates = by_round(_rates(timings[best]), _rates(timings[PLAIN]))
    return Claim(
        _name(found.workload.name),
        f"{setting}; baseline: bf16",
        _SPEEDS[alone],
        f"{best} is the fastest. Times as fast as bf16 for the whole workload: {', '.join(ratios)}; its tokens of "
        f"answers per second {Ratio.of_rounds(rates)}",
        _WHY[alone],
        ratio=Ratio.of_rounds(rates),
    )


def _rates(timing: Timing) -> list[float]:
    """Tokens of answers per second, by round."""
    return [step["rate"] for step in timing.steps]
