"""Questions with right answers. The figure is the share of greedy answers that are right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals.answers import answer, fitting
from dovetail.evals.prompts import Example, Prompt, encode, has_template, row_prompt
from dovetail.evals.rows import Rows, given_file, left_out, read_jsonl, read_lines
from dovetail.evals.scorers import scorer
from dovetail.evals.suite import Result, Suite, at_least

if TYPE_CHECKING:
    from dovetail.llm import LLM

TOKENS = 256
GSM8K_FILES = ("gsm8k_test*.jsonl", "test.jsonl")
GSM8K_LIMIT, GSM8K_TOKENS = 200, 512
# What Qwen's and DeepSeek's reports ask their instruct models, without worked examples.
GSM8K_ASKS = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Asked:
    """A question's token ids and its right answer."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Jsonl(Suite):
    """Options. data: a JSONL file whose rows have an `answer` and a `prompt`, a `question` or `messages`. shots:
    the first so many rows are worked examples before each question. limit: so many other rows are scored, by
    `scorer`."""

    data: Path | None = None
    scorer: str = "exact"
    shots: int = 0
    limit: int | None = None
    tokens: int = TOKENS

    name = "jsonl"
    quality = "accuracy"
    columns = ("accuracy", "stderr", "decode_tokens_per_s")

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, tokens=self.tokens)
        at_least(0, shots=self.shots)
        scorer(self.scorer)
        self.file()

    def file(self) -> Path:
        """The file with the rows. ConfigError where there is none."""
        return given_file(self.name, self.data)

    def questions(self) -> str | None:
        return read_lines(self.file()).digest

    def ask(self, row: Mapping[str, Any]) -> Prompt:
        """How a row is asked. RequestError if it cannot be."""
        return row_prompt(row)

    def measure(self, llm: LLM, reference: Any) -> Result:
        rows = self._rows(llm)
        # Without a chat template the examples are paragraphs, and so is the answer.
        stop = ("\n\n",) if self.shots and not has_template(llm) else ()
        answers = answer(llm, [r.prompt for r in rows.values], self.tokens, stop)
        judge = scorer(self.scorer)
        items = [
            {"line": line, "correct": judge.correct(output.text, row.answer), "answer": output.text}
            for (line, row), output in zip(rows.rows, answers.outputs, strict=True)
        ]
        correct = sum(bool(item["correct"]) for item in items)
        return {
            "data": rows.name,
            "data_sha256": rows.digest,
            "scorer": self.scorer,
            "shots": self.shots,
            "accuracy": correct / len(items),
            "correct": correct,
            "total": len(items),
            "stderr": binomial_error(correct, len(items)),
            **rows.facts,
            **answers.facts,
            "items": items,
        }

    def _rows(self, llm: LLM) -> Rows[Asked]:
        judge = scorer(self.scorer)

        def example(row: Mapping[str, Any]) -> Example:
            found = Example(self.ask(row), _right(row))
            judge.expected(found.answer)
            return found

        examples, rest = read_jsonl(self.file()).map(example).split(self.shots)

        def asked(given: Example) -> Asked:
            return Asked(fitting(llm, encode(llm, given.prompt, examples), self.tokens), given.answer)

        return rest.first(self.limit).map(asked)

    def share(self, result: Result, key: str) -> tuple[float, int] | None:
        return (result["correct"], result["total"]) if key == "accuracy" else None

    def text(self, result: Result) -> str:
        r = result
        return (
            f"accuracy {r['accuracy']:.1%} ± {r['stderr']:.1%}: {r['correct']} of {r['total']} by {r['scorer']}, "
            f"{r['shots']} shots; {r['unfinished']} cut off; {r['tokens_per_s']:.0f} tokens/s{left_out(r)}"
        )


@dataclass(frozen=True)
class Gsm8k(Jsonl):
    """GSM8K (arXiv 2110.14168): school maths, scored by the last number. Options as for `jsonl`; `data` may be
    the folder that holds its test file. Without worked examples a question ends with GSM8K_ASKS."""

    scorer: str = "number"
    limit: int | None = GSM8K_LIMIT
    tokens: int = GSM8K_TOKENS

    name = "gsm8k"

    def ask(self, row: Mapping[str, Any]) -> Prompt:
        if self.shots or not isinstance(row.get("question"), str):
            return row_prompt(row)
        return row_prompt({**row, "question": f"{row['question']}\n{GSM8K_ASKS}"})

    def file(self) -> Path:
        """The test file. ConfigError says where to get it."""
        given = self.data.expanduser() if self.data is not None else None
        if given is None or not given.exists():
            raise ConfigError(
                f"the suite gsm8k needs GSM8K's test file as --data FILE, or its folder, got {self.data}; it is "
                "grade_school_math/data/test.jsonl in https://github.com/openai/grade-school-math"
            )
        found = [given] if given.is_file() else [p for name in GSM8K_FILES for p in sorted(given.glob(name))]
        if not found:
            raise ConfigError(f"the suite gsm8k: {given} has no {' or '.join(GSM8K_FILES)}")
        return found[0]


def binomial_error(successes: int, trials: int) -> float:
    """Standard error of the share of successes."""
    share = successes / trials
    return math.sqrt(share * (1 - share) / trials)


def _right(row: Mapping[str, Any]) -> str:
    """A row's right answer as text."""
    value = row.get("answer")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise RequestError(f"answer must be text or a number, got {str(value)[:60]!r}")
    return str(value)
