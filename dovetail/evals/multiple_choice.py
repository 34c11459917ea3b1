"""Questions with choices. The choice that is the likeliest continuation counts as the answer.

Scores are those of lm-evaluation-harness. `acc` takes the sum of the log-probabilities of a choice's tokens behind
the question. `acc_norm` divides that sum by the choice's length in UTF-8 bytes. (Where bytes and characters
differ, the harness calls this acc_bytes.) Texts are given as they are, without a chat template. Rows before the
last token of the question read everything. That row predicts a choice's first token; it and all later rows run
through the techniques in use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import RequestError
from dovetail.evals.prompts import question
from dovetail.evals.rows import given_file, left_out, read_jsonl, read_lines
from dovetail.evals.scoring import score
from dovetail.evals.suite import Result, Suite, at_least
from dovetail.evals.tasks import binomial_error

if TYPE_CHECKING:
    from dovetail.llm import LLM

CONTEXTS = ("question", "context", "prompt")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """A context, the choices that may continue it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Texts:
    """For each choice: the token ids of the context with the choice behind it, where the choice begins, and its
    length in bytes. And the index of the right choice."""

    ids: list[list[int]]
    first: list[int]
    lengths: list[int]
    right: int


@dataclass(frozen=True)
class MultipleChoice(Suite):
    """Options: `data`, a JSONL file whose rows have a `question` (or `context`, `prompt`), `choices` and an
    `answer`; its first `limit` rows count."""

    data: Path | None = None
    limit: int | None = None

    name = "multiple-choice"
    quality = "acc"
    columns = ("acc", "acc_norm", "decode_tokens_per_s")

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit)
        given_file(self.name, self.data)

    def questions(self) -> str | None:
        return read_lines(given_file(self.name, self.data)).digest

    def measure(self, llm: LLM, reference: Any) -> Result:
        given = read_jsonl(given_file(self.name, self.data)).map(parse).first(self.limit)
        rows = given.map(lambda row: encode(llm, row))
        start = time.perf_counter()
        scores = log_likelihoods(llm, rows.values)
        seconds = time.perf_counter() - start
        items = [_item(line, row, found) for (line, row), found in zip(rows.rows, scores, strict=True)]
        correct = sum(item["correct"] for item in items)
        normed = sum(item["correct_norm"] for item in items)
        tokens = sum(len(ids) - first for r in rows.values for ids, first in zip(r.ids, r.first, strict=True))
        return {
            "data": rows.name,
            "data_sha256": rows.digest,
            "total": len(items),
            "acc": correct / len(items),
            "acc_stderr": binomial_error(correct, len(items)),
            "acc_norm": normed / len(items),
            "acc_norm_stderr": binomial_error(normed, len(items)),
            **rows.facts,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "items": items,
        }

    def share(self, result: Result, key: str) -> tuple[float, int] | None:
        return (result[key] * result["total"], result["total"]) if key in ("acc", "acc_norm") else None

    def text(self, result: Result) -> str:
        r = result
        return (
            f"acc {r['acc']:.1%} ± {r['acc_stderr']:.1%}, acc_norm {r['acc_norm']:.1%} ± "
            f"{r['acc_norm_stderr']:.1%} of {r['total']} questions; {r['tokens_per_s']:.0f} tokens/s{left_out(r)}"
        )


def parse(row: Mapping[str, Any]) -> Choices:
    """A JSONL row as a question with choices. RequestError if it is not one."""
    given = [name for name in CONTEXTS if row.get(name) is not None]
    if len(given) != 1:
        raise RequestError(f"a row needs one of {', '.join(CONTEXTS)}, and has {', '.join(given) or 'none'}")
    context = row[given[0]]
    if not isinstance(context, str) or not context.strip():
        raise RequestError(f"{given[0]} must be text that is not empty")
    choices, labels = _choices(row.get("choices"))
    answer = row["answer"] if row.get("answer") is not None else row.get("answerKey")
    right = _right(answer, choices, labels)
    return Choices(question(context) if given[0] == "question" else context, tuple(choices), right)


def _choices(given: Any) -> tuple[list[str], list[str]]:
    """The texts and labels of choices given as a list, or as {"text": [...], "label": [...]}. A list has no
    labels."""
    texts, labels = given, []
    if isinstance(given, Mapping):
        texts, labels = given.get("text"), given.get("label", [])
    for name, values in (("choices", texts), ("labels of choices", labels)):
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise RequestError(f"{name} must be a list of texts")
    if len(texts) < 2:
        raise RequestError(f"a question needs at least 2 choices, and has {len(texts)}")
    if labels and len(labels) != len(texts):
        raise RequestError(f"there are {len(texts)} choices and {len(labels)} labels")
    for i, text in enumerate(texts):
        if not text.strip():
            raise RequestError(f"choice {i} is empty")
    return texts, labels


def _right(answer: Any, choices: list[str], labels: list[str]) -> int:
    """The index of the right choice. An answer may be an index, a label, a text or a letter."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    for names in (labels, choices, [] if labels else list(LETTERS[: len(choices)])):
        if answer in names:
            return names.index(answer)
    raise RequestError(f"answer must be the index, label or text of one of {len(choices)} choices, got {answer!r}")


def encode(llm: LLM, row: Choices) -> Texts:
    """Token ids as in lm-evaluation-harness. White space at the end of the context belongs to the choice. If the
    context alone has n tokens, the choice's tokens are those of the whole text behind the first n. RequestError if
    a text is longer than the engine's context, or if a choice adds no token."""
    context = row.context.rstrip()
    space = row.context[len(context) :]
    begin = len(llm.tokenizer.encode(context))
    limit = llm.config.max_model_len
    ids = []
    for i, choice in enumerate(row.choices):
        gap = space or ("" if choice[0].isspace() else " ")
        ids.append(llm.tokenizer.encode(context + gap + choice))
        if len(ids[-1]) > limit:
            raise RequestError(f"with choice {i} it has {len(ids[-1])} tokens, but the context holds {limit}")
        if not 1 <= begin < len(ids[-1]):
            raise RequestError(f"choice {i} adds no token to the question")
    return Texts(ids, [begin] * len(ids), [len(c.encode()) for c in row.choices], row.right)


def log_likelihoods(llm: LLM, rows: Sequence[Texts]) -> list[list[float]]:
    """The natural log-probability of each row's choices.

    Of the questions that run at once, all first choices come first. When the second choices follow, the questions
    are in the prefix cache.
    """
    block = llm.config.max_num_seqs
    order = [(at, choice) for at, row in enumerate(rows) for choice in range(len(row.ids))]
    order.sort(key=lambda place: (place[0] // block, place[1], place[0]))
    first = [rows[at].first[choice] for at, choice in order]
    scores = score(llm, [rows[at].ids[choice] for at, choice in order], first, [n - 1 for n in first])
    sums = {place: math.fsum(found) for place, found in zip(order, scores, strict=True)}
    return [[sums[at, choice] for choice in range(len(row.ids))] for at, row in enumerate(rows)]


def _item(line: int, row: Texts, scores: list[float]) -> dict[str, Any]:
    """What a result says about a question: the likeliest choice, in all and by byte, and every choice's score."""
    likeliest = _largest(scores)
    by_byte = _largest([s / n for s, n in zip(scores, row.lengths, strict=True)])
    return {
        "line": line,
        "correct": likeliest == row.right,
        "correct_norm": by_byte == row.right,
        "answer": likeliest,
        "answer_norm": by_byte,
        "loglikelihoods": scores,
    }


def _largest(values: Sequence[float]) -> int:
    """The index of the largest value, the first one of equals."""
    return max(range(len(values)), key=values.__getitem__)
