"""Log-probabilities of given tokens, through the path that serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Probe

if TYPE_CHECKING:
    from dovetail.llm import LLM

FORCE = 100.0  # logit bias that makes a token the likeliest; reported log-probabilities are without it


def score(llm: LLM, texts: Sequence[list[int]], first: Sequence[int], dense: Sequence[int]) -> list[list[float]]:
    """Natural log-probabilities of tokens first[i], first[i] + 1, ... of text i, each given all tokens before it.

    The last token of a text is chosen, not computed, so a text may fill the context to its end. Rows before
    position dense[i] read everything. RequestError if a text cannot be scored.
    """
    params, probes = [], []
    for ids, begin, until in zip(texts, first, dense, strict=True):
        if not 1 <= begin < len(ids):
            raise RequestError(f"a text of {len(ids)} tokens cannot be scored from token {begin} on")
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=1,
                logprobs=0,
                prompt_logprobs=0,
                ignore_eos=True,
                logit_bias={ids[-1]: FORCE},
            )
        )
        probes.append(Probe(until, min(begin, len(ids) - 1)))
    outputs = llm.generate([ids[:-1] for ids in texts], params, probes=probes)
    found = []
    for ids, begin, output in zip(texts, first, outputs, strict=True):
        if output.error or output.prompt_logprobs is None:
            raise RequestError(f"a text could not be scored: {output.error or 'no log-probabilities came back'}")
        answer = output.outputs[0]
        if answer.token_ids != ids[-1:] or not answer.logprobs:
            raise RequestError(f"token {ids[-1]} could not be scored: the model will not have it at any bias")
        entries = [*output.prompt_logprobs, *answer.logprobs]
        scored = [entry[token].logprob for entry, token in zip(entries, ids, strict=True) if entry]
        found.append(scored[len(scored) - (len(ids) - begin) :])
    return found
