"""A batch whose KV lies in slow memory: tokens per second, and needles at that setting (InfiniGen, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.bench.verdict import at_least, decide_exact
from dovetail.reproduce import needles
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.infinigen.guesses import Effort
from dovetail.reproduce.limited import WAITING, Comparison, Side, compare
from dovetail.reproduce.needles import Subject

NEEDED, FETCHED = 3.0, 0.1  # times as fast; of KV
EMULATED, DISK, MOVED = "decoding with KV in slow memory", "decoding with KV on disk", "KV fetched for a token"
PLAIN = "decoding, beside the plain engine"
NEEDLES = "section 5 (OPT and Llama-2, tasks of up to 2048 tokens): as good as everything at under 10 % of KV"
_NEEDLES_WHY = "The paper has no task that hangs on one place in a long context."


def experiment(effort: Effort) -> Experiment:
    return Experiment("decoding with KV in slow memory", (EMULATED, MOVED, PLAIN, DISK), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    for name, backend in ((EMULATED, "host"), (DISK, "disk")):
        emulated = backend == "host"
        sides = (Side((), backend), Side((effort.use,), backend))
        found = compare(effort.limit, *sides, at_least(NEEDED) if emulated else None)
        yield Claim(
            name,
            f"{_setting(effort, backend)}; baseline: the same engine and slow tier without the technique, which "
            "fetches all KV",
            "section 5: up to 3.00 times as fast as other systems; OPT-13B, 2048 tokens: 5.28 times FlexGen",
            str(found),
            "The device holds what several steps read, so most of what is chosen is there already.",
            kind="emulated" if emulated else "run",
            ratio=found.ratio,
            paper_ratio=(3.0, 5.28),
            bar=found.decision,
        )
        if emulated:
            yield _moved(effort, found)
            yield _plain(effort)


def _setting(effort: Effort, backend: str) -> str:
    return f"{effort.limit}, {effort.use}, {effort.limit.tier(backend)}"


def _moved(effort: Effort, found: Comparison) -> Claim:
    """The share of a request's KV that each of its tokens fetches."""
    share = found.ours.bytes_in / (effort.limit.context * effort.limit.token_bytes)
    return Claim(
        MOVED,
        _setting(effort, "host"),
        "abstract and section 5: less than 10 % of KV",
        f"{share:.1%} of a request's KV crosses the link for a token",
        "A page that the step before has read is on the device.",
        kind="emulated",
        bar=decide_exact(f"at most {FETCHED:.0%}", share <= FETCHED),
    )


def _plain(effort: Effort) -> Claim:
    """The other way to serve these requests: the plain engine, with as many at a time as fit."""
    found = compare(effort.limit, Side(()), Side((effort.use,), "host"))
    return Claim(
        PLAIN,
        f"{_setting(effort, 'host')}; baseline: {WAITING}",
        "not compared",
        str(found),
        "On this model the weights are few, so that a small batch loses little.",
        kind="emulated",
        ratio=found.ratio,
    )


def needles_experiment(effort: Effort) -> Experiment:
    return needles.experiment(effort.needles, Subject(effort.use, NEEDLES, _NEEDLES_WHY, slow_tier=True))
