"""Prompts of evaluations: conversations or plain text, from a file or built in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import RequestError
from dovetail.evals.rows import Rows, read_jsonl, read_text

if TYPE_CHECKING:
    from dovetail.llm import LLM

BUILT_IN = "built-in"
FIELDS = ("messages", "prompt", "question")
TEXTS = (
    "Name the capital of France and one thing it is known for.",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "List five things to pack for a weekend in the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into French: The train leaves at half past seven tomorrow morning.",
    "A shop sells pencils at 3 for 2 dollars. How much do 12 pencils cost? Show the steps.",
    "Summarise the story of Romeo and Juliet in three sentences.",
    "Give the opposite of each word: warm, early, generous, shallow, loud.",
    "Write a polite e-mail that asks to move a meeting from Monday to Wednesday.",
    "How does a bicycle stay upright while it moves?",
    "Count from 1 to 20 and leave out every multiple of 3.",
    "Write a JSON object for a book with its title, author, year and two genres.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers, and why?",
    "Describe the taste of a lemon to somebody who has never had one.",
    "Put these in order of size, smallest first: planet, atom, galaxy, city, molecule.",
    "Explain recursion to a ten-year-old.",
    "Begin a mystery story that takes place on a night train.",
    "What should I do if I spill red wine on a white carpet?",
    "Write an SQL query that finds the three customers with the largest total of orders.",
    "Is it true that people use only a tenth of their brain? Answer yes or no, then explain.",
    "Give three arguments for and three against working from home.",
    "Repeat this word ten times, separated by commas: dovetail.",
)


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, and the text that is used if a model has no chat template."""

    messages: tuple[Mapping[str, Any], ...]
    plain: str | None


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer."""

    prompt: Prompt
    answer: str


def prompts(path: Path | None) -> Rows[Prompt]:
    """The built-in prompts, or those of a file: rows if its name ends in .jsonl, else a prompt a line.

    ConfigError if the file cannot be read, RequestError if it has no prompt.
    """
    if path is None:
        digest = hashlib.sha256("\n".join(TEXTS).encode()).hexdigest()[:12]
        return Rows(BUILT_IN, digest, tuple(enumerate(map(text_prompt, TEXTS), start=1)))
    path = path.expanduser()
    if path.suffix == ".jsonl":
        return read_jsonl(path).map(row_prompt)
    return read_text(path).map(text_prompt)


def text_prompt(text: str) -> Prompt:
    """A prompt of a text that a user wrote. A model without a chat template continues the text."""
    return Prompt(({"role": "user", "content": text},), text)


def row_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a JSONL row: its `messages`, `prompt` or `question`. RequestError if it has none or two of
    them.

    For a model without a chat template a question is written as in lm-evaluation-harness.
    """
    from dovetail.text.conversation import check_messages

    given = [name for name in FIELDS if row.get(name) is not None]
    if len(given) != 1:
        raise RequestError(f"a row needs one of {', '.join(FIELDS)}, and has {', '.join(given) or 'none'}")
    value = row[given[0]]
    if given[0] == "messages":
        check_messages(value)
        return Prompt(tuple(value), None)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{given[0]} must be text that is not empty")
    prompt = text_prompt(value)
    return prompt if given[0] == "prompt" else Prompt(prompt.messages, question(value))


def question(text: str) -> str:
    """A question as a text that its answer continues."""
    return f"Question: {text}\nAnswer:"


def has_template(llm: LLM) -> bool:
    return "default" in llm.tokenizer.templates


def encode(llm: LLM, prompt: Prompt, examples: Sequence[Example] = ()) -> list[int]:
    """Token ids of a prompt with worked examples before it. The examples are earlier turns of the conversation, or
    paragraphs of one text if the model has no chat template. RequestError if that is impossible."""
    if has_template(llm):
        turns = [m for e in examples for m in (*e.prompt.messages, {"role": "assistant", "content": e.answer})]
        return llm.chat_tokens([*turns, *prompt.messages])
    texts = [prompt.plain, *(e.prompt.plain for e in examples)]
    if None in texts:
        raise RequestError("the model has no chat template, which messages need; give prompt or question")
    blocks = [f"{e.prompt.plain} {e.answer}" for e in examples]
    ids: list[int] = llm.tokenizer.encode("\n\n".join([*blocks, prompt.plain or ""]))
    return ids
