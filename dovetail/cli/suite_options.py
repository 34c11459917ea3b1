"""Options of single suites of `dovetail eval`. A suite takes those that are its fields."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class SuiteOptions:
    """Only what was given on the command line, by the name of the suite's field."""

    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """Command-line options, all without a default: the suite has its own."""
        found = []
        for name, (kind, text) in OPTIONS.items():
            flag = "--" + name.replace("_", "-")
            option = typer.Option(flag, help=text, rich_help_panel="Suite", show_default=False)
            found.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
                )
            )
        return found

    @classmethod
    def collect(cls, values: dict[str, Any]) -> SuiteOptions:
        """Take this bundle's values out of a command's."""
        taken = {name: values.pop(name) for name in OPTIONS}
        return cls({name: value for name, value in taken.items() if value is not None})


OPTIONS: dict[str, tuple[Any, str]] = {
    "corpus": (str, "Text to measure on: pydoc (default), wikitext2, wikitext2-raw, shakespeare, or a file."),
    "data": (Path, "Folder that holds the corpora and tasks that go by name, or a task's file."),
    "window": (int, "Tokens of context: of a window that is scored, or of a prompt that is continued."),
    "windows": (int, "How many windows of the corpus, from its start."),
    "dense": (int, "Tokens at the start of a window that read everything, whatever techniques are in use."),
    "tokens": (int, "Tokens of each answer."),
    "prompts": (Path, "File of prompts to answer: a line of text each, or .jsonl with prompt or messages."),
    "limit": (int, "How many rows of the file count, from its start. gsm8k: 200 by default."),
    "scorer": (str, "When an answer is right: exact, contains, number, choice, or regex:PATTERN."),
    "shots": (int, "Rows at the start of the file that are worked examples before each question."),
    "lengths": (str, "Tokens of context and question, as in 1024,2048 or 1024..8192 (doubling)."),
    "depths": (str, "Where the needle is in the context, in percent, as in 0,50,100."),
    "trials": (int, "Trials for each length and depth."),
    "variant": (str, "Needles: single, multikey, multivalue or multiquery."),
    "needles": (int, "How many needles a context has. Default: 1, or 4 in the multi variants."),
}
