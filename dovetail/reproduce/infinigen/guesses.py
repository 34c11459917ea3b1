"""How alike neighbouring layers are, and how much is guessed right (InfiniGen, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dovetail.bench.verdict import decide_exact
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Probe
from dovetail.llm import LLM
from dovetail.reproduce import limited
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.infinigen.prediction import likeness, watching
from dovetail.text.corpus import DEFAULT, corpus

FOUND, READ = 0.9, 0.1  # of what would be chosen, at least; of KV, at most
ALIKE, GUESSED = "inputs of neighbouring layers", "pages guessed right"


@dataclass(frozen=True)
class Effort(limited.Effort):
    """context, rows: tokens of text, and of those after them whose guesses are judged."""

    context: int = 4096
    rows: int = 64


EFFORTS = Effort.by_name(requests=4, use="infinigen:budget=512")


def experiment(effort: Effort) -> Experiment:
    return Experiment("guesses", (ALIKE, GUESSED), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    length = effort.context + effort.rows
    llm = LLM(effort.limit.model, use=[watching([effort.use])], kv_cache_dtype="bf16", max_model_len=length + 2)
    tokens = llm.tokenizer.encode(corpus(DEFAULT).text[-8 * length :], add_special_tokens=False)[-length:]
    selector: Any = llm.engine.seams.selector
    alike = likeness(selector.site, tokens[: effort.context // 2])
    yield Claim(
        ALIKE,
        f"{effort.limit.model}, {effort.context // 2} tokens of text; the mean cosine for each pair of layers",
        "section 4: 0.89 to 0.97 (OPT and Llama-2)",
        f"{min(alike):.2f} to {max(alike):.2f}, {sum(alike) / len(alike):.2f} on the average; "
        f"{sum(x < 0.89 for x in alike)} of {len(alike)} pairs are below 0.89",
        "A small model does more in each of its layers.",
    )
    llm.generate(
        [tokens],
        SamplingParams(temperature=0, max_tokens=1),
        probes=Probe(dense_until=effort.context),
        progress=False,
    )
    found = selector.predictions[0].to_dict()
    yield Claim(
        GUESSED,
        f"{effort.limit.model}, {effort.rows} tokens of text behind {effort.context}, {effort.use}; of the pages "
        "that the layer's own queries choose by the same rule",
        "section 5: under 10 % of KV is read, without loss",
        f"{found['found']:.1%} of them, {found['weight_found']:.1%} by their weight as whole keys have it, "
        f"and {found['read']:.1%} of KV is read",
        "The guess is made a layer early, from a part of the dimensions.",
        bar=decide_exact(
            f"at least {FOUND:.0%} found, at most {READ:.0%} read",
            found["found"] >= FOUND and found["read"] <= READ,
        ),
    )
