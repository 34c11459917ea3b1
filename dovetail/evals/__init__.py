"""Measures the quality of what is served, on the path that serves it. A suite is a class here, and a line in
SUITES. Imports the engine and bench; imported by advise, reproduce and cli."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.evals.suite import Suite

SUITES = {
    "perplexity": ("perplexity", "Perplexity"),
    "divergence": ("divergence", "Divergence"),
    "similarity": ("similarity", "Similarity"),
    "jsonl": ("tasks", "Jsonl"),
    "gsm8k": ("tasks", "Gsm8k"),
    "humaneval": ("humaneval", "HumanEval"),
    "multiple-choice": ("multiple_choice", "MultipleChoice"),
    "needle": ("needle", "Needle"),
}


def find(name: str) -> type[Suite]:
    """The suite's class. ConfigError lists the known names."""
    if name not in SUITES:
        raise ConfigError(f"suite '{name}' is unknown; the known ones are {', '.join(SUITES)}")
    module, kind = SUITES[name]
    found: type[Suite] = getattr(import_module(f"dovetail.evals.{module}"), kind)
    return found
