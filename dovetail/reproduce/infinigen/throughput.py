"""Tokens per second of a batch whose KV lies in slow memory (InfiniGen, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.llm import LLM
from dovetail.reproduce.claim import Bar, Claim, Experiment
from dovetail.reproduce.infinigen.effort import Effort
from dovetail.reproduce.limited import Side, compare

NEEDED, FETCHED = 3.0, 0.1  # times as fast; of KV
EMULATED, DISK, MOVED = "decoding with KV in slow memory", "decoding with KV on disk", "KV fetched for a token"
PLAIN = "decoding, beside the plain engine"


def experiment(effort: Effort) -> Experiment:
    return Experiment("decoding with KV in slow memory", (EMULATED, MOVED, PLAIN, DISK), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    limit = effort.limit
    for name, backend in ((EMULATED, "host"), (DISK, "disk")):
        found = compare(limit, Side((), backend), Side((effort.use,), backend))
        emulated = backend == "host"
        link = f"memory behind an emulated link of {limit.link:.0f} GB/s"
        setting = f"{limit}, {effort.use}, slow tier: {link if emulated else 'this disk'}"
        yield Claim(
            name,
            f"{setting}; baseline: the same engine and slow tier without the technique, which fetches all KV",
            "section 5: up to 3.00 times as fast as other systems; OPT-13B, 2048 tokens: 5.28 times FlexGen",
            str(found),
            "The device holds what several steps read, so most of what is chosen is there already.",
            kind="emulated" if emulated else "run",
            ratio=found.ratio,
            paper_ratio=(3.0, 5.28),
            bar=Bar(f"at least {NEEDED:.0f}", found.ratio.median >= NEEDED) if emulated else None,
        )
        if emulated:
            share = found.ours.bytes_in / (limit.context * token_bytes(limit.model))
            yield Claim(
                MOVED,
                setting,
                "abstract and section 5: less than 10 % of KV",
                f"{share:.1%} of a request's KV crosses the link for a token",
                "A page that the step before has read is on the device.",
                kind="emulated",
                bar=Bar(f"at most {FETCHED:.0%}", share <= FETCHED),
            )
            yield plain(effort, setting)


def plain(effort: Effort, setting: str) -> Claim:
    """The other way to serve these requests: as many at a time as fit."""
    found = compare(effort.limit, Side(()), Side((effort.use,), "host"))
    return Claim(
        PLAIN,
        f"{setting}; baseline: the same engine without technique and slow tier, where the other requests wait",
        "not compared",
        str(found),
        "On this model the weights are few, so that a small batch loses little.",
        kind="emulated",
        ratio=found.ratio,
    )


def token_bytes(model: str) -> int:
    """Of K and V of a token in bfloat16."""
    config = LLM(model, kv_cache_dtype="bf16", max_model_len=64, max_num_seqs=1).config
    return config.kv_memory // (config.num_kv_pages * config.block_size)
