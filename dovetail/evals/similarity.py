"""How similar an engine's greedy answers are to a reference's, for the same prompts.

arXiv 2411.02355 compares quantized models with the original in this way. The figures are means over the prompts.
They are 1 for equal answers:

- `exact`: tokens before the first difference, as a share of the longer answer's tokens (end of sequence included);
- `identical`: the share of answers that are the same to the last token;
- `rougeL`: ROUGE-L F1 of words (Lin 2004), that is 2 LCS / (m + n) for answers of m and n words whose longest
  common subsequence has LCS; words are runs of letters and digits, in lower case;
- `edit`: 1 - Levenshtein distance / length of the longer answer, in characters.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dovetail.evals.answers import answer, fitting
from dovetail.evals.prompts import encode, prompts
from dovetail.evals.rows import Rows, left_out
from dovetail.evals.suite import Result, Suite, at_least

if TYPE_CHECKING:
    from dovetail.llm import LLM
    from dovetail.outputs import CompletionOutput

TOKENS = 128
_WORD = re.compile(r"[^\W_]+")


class Answered(NamedTuple):
    """A prompt's token ids and the reference's answer to it."""

    prompt: list[int]
    answer: CompletionOutput


@dataclass(frozen=True)
class Similarity(Suite):
    """Options: `tokens` at most per answer; `prompts` is a file, of which the first `limit` rows count."""

    prompts: Path | None = None
    tokens: int = TOKENS
    limit: int | None = None

    name = "similarity"
    quality = "rougeL"
    columns = ("exact", "identical", "rougeL", "edit", "decode_tokens_per_s")
    compares = True

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, limit=self.limit)

    def refer(self, llm: LLM) -> Rows[Answered]:
        asked = prompts(self.prompts).first(self.limit)
        ids = asked.map(lambda prompt: fitting(llm, encode(llm, prompt), self.tokens))
        answers = answer(llm, ids.values, self.tokens)
        return ids.zip(answers.outputs).map(lambda pair: Answered(*pair))

    def measure(self, llm: LLM, reference: Rows[Answered]) -> Result:
        asked = reference.map(lambda r: Answered(fitting(llm, r.prompt, self.tokens), r.answer))
        answers = answer(llm, [r.prompt for r in asked.values], self.tokens)
        pairs = [(r.answer, o) for r, o in zip(asked.values, answers.outputs, strict=True)]
        shared = [leading(a.token_ids, b.token_ids) for a, b in pairs]
        shares = [n / max(len(a.token_ids), len(b.token_ids)) for n, (a, b) in zip(shared, pairs, strict=True)]
        return {
            "prompts": asked.name,
            "prompts_sha256": asked.digest,
            "answers": len(pairs),
            "exact": statistics.fmean(shares),
            "exact_tokens": statistics.fmean(shared),
            "identical": statistics.fmean(share == 1 for share in shares),
            "rougeL": statistics.fmean(rouge_l(a.text, b.text) for a, b in pairs),
            "edit": statistics.fmean(edit_similarity(a.text, b.text) for a, b in pairs),
            **asked.facts,
            **answers.facts,
        }

    def text(self, result: Result) -> str:
        r = result
        return (
            f"{r['identical']:.1%} of {r['answers']} answers identical; the same for {r['exact']:.1%} of their "
            f"tokens ({r['exact_tokens']:.1f}); ROUGE-L {r['rougeL']:.3f}, edit similarity {r['edit']:.3f}; "
            f"{r['tokens_per_s']:.0f} tokens/s{left_out(r)}"
        )


def leading(reference: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens are equal before the first difference."""
    pairs = zip(reference, answer, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(answer)))


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F1 of words; 1 where neither text has any."""
    from rapidfuzz.distance import Indel

    # The similarity in insertions and deletions is 2 LCS / (m + n).
    return Indel.normalized_similarity(words(reference), words(answer))


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def edit_similarity(reference: str, answer: str) -> float:
    """1 - Levenshtein distance / length of the longer text, in characters; 1 where both are empty."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(reference, answer)
