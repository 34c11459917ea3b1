"""Perplexity of a model through the serving path: the code that answers requests also scores these.

    .venv/bin/python bench/perplexity.py [MODEL] [--corpus FILE] [--window 2048] [--windows 6] [--dtype D]
        [--activations A] [--kernels K] [--kv-cache-dtype KV] [--json]

The corpus is tokenized whole and cut into windows that do not overlap. Every token after the first of a window
is scored; the result is exp of the mean of the windows' mean negative log-likelihoods. Without --corpus the text
is the language reference that comes with Python (pydoc_data.topics), which differs between Python versions.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dovetail import LLM, DovetailError, SamplingParams

ARITHMETIC = ("dtype", "activations", "kernels", "kv_cache_dtype")  # options, and what came of them


def window_nll(llm: LLM, ids: list[int]) -> float:
    """Mean negative log-likelihood of the tokens of `ids` after the first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    (output,) = llm.generate(ids, params, progress=False)
    if output.error or output.prompt_logprobs is None:
        raise RuntimeError(output.error or "no prompt log-probabilities came back")
    scored = [entry[token].logprob for entry, token in zip(output.prompt_logprobs, ids, strict=True) if entry]
    if len(scored) != len(ids) - 1:
        raise RuntimeError(f"{len(scored)} of {len(ids) - 1} tokens were scored")
    return -statistics.fmean(scored)


def perplexity(llm: LLM, text: str, window: int, windows: int) -> dict[str, Any]:
    """Score the first `windows` windows of `text`. ValueError where it is too short."""
    ids = llm.tokenizer.encode(text)
    if len(ids) < window * windows:
        raise ValueError(
            f"the corpus has {len(ids)} tokens: {len(ids) // window} windows of {window}, not {windows}"
        )
    losses: list[float] = []
    for i in range(windows):
        start = time.perf_counter()
        losses.append(window_nll(llm, ids[i * window : (i + 1) * window]))
        so_far, seconds = math.exp(statistics.fmean(losses)), time.perf_counter() - start
        print(f"window {i + 1}/{windows}: {so_far:.4f} so far, {seconds:.1f} s", file=sys.stderr, flush=True)
    mean = statistics.fmean(losses)
    return {"perplexity": math.exp(mean), "nll": mean, "windows": losses, "window": window}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--corpus", type=Path, help="UTF-8 text (default: pydoc_data.topics)")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window (default 2048)")
    parser.add_argument("--windows", type=int, default=6, help="how many windows from the start (default 6)")
    for name in ARITHMETIC:
        parser.add_argument(f"--{name.replace('_', '-')}", default="auto")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.window < 2 or args.windows < 1:
        parser.error("--window must be at least 2 and --windows at least 1")
    try:
        text = args.corpus.read_text("utf-8") if args.corpus else "\n".join(pydoc_data.topics.topics.values())
        llm = LLM(args.model, **{name: getattr(args, name) for name in ARITHMETIC})
        result = perplexity(llm, text, args.window, args.windows)
    except (OSError, ValueError, DovetailError) as error:
        parser.exit(1, f"{error}\n")
    config = llm.config
    print(
        f"perplexity {result['perplexity']:.4f}: {args.model}, {config.arithmetic}, "
        f"{args.windows} windows of {args.window} tokens of {args.corpus or 'pydoc_data.topics'}"
    )
    if args.json:
        facts = {name: getattr(config, name) for name in ARITHMETIC}
        print(
            json.dumps({**result, "model": args.model, **facts, "corpus": str(args.corpus or "pydoc_data.topics")})
        )


if __name__ == "__main__":
    main()
