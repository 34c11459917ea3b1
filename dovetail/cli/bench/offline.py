"""`dovetail bench offline`: throughput on a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli import terminal
from dovetail.cli.bench.report import AGAINST_HELP, ROUNDS_HELP, finish, settings, show
from dovetail.cli.engine_options import EngineOptions, SamplingOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.show.progress import note

MAX_TOKENS = 128
ROUNDS = 3  # with two settings; one alone is measured once

SHOWN = {
    "requests_per_s": ("requests", "1/s", 1.0),
    "prompt_tokens_per_s": ("prompts", "tokens/s", 1.0),
    "output_tokens_per_s": ("answers", "tokens/s", 1.0),
    "seconds": ("time", "s", 1.0),
    "prompt_tokens": ("prompts", "tokens", 1.0),
    "output_tokens": ("answers", "tokens", 1.0),
    "mean_batch": ("requests in a step", "", 1.0),
    "cached_tokens": ("prefix cache hits", "tokens", 1.0),
    "preemptions": ("preemptions", "", 1.0),
}


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    source: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Prompts, one a line.", exists=True, dir_okay=False)
    ],
    engine: EngineOptions,
    sampling: SamplingOptions,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many prompts.")] = None,
    against: Annotated[str | None, typer.Option(metavar="SPEC", help=AGAINST_HELP)] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help=f"{ROUNDS_HELP} Default: 1, {ROUNDS} with --against.", show_default=False),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Time a file of prompts that are all there at once.

    A line of FILE is a prompt. In a .jsonl file, or in one that begins with {, a line is an object with prompt
    (text or token ids) or messages, and max_tokens (128 if it is absent). Broken lines are reported and left out.
    Prompts are tokenized before the clock starts, and the prefix cache is empty then.

    \b
    Examples:
      dovetail bench offline smollm2-135m --input prompts.txt --max-tokens 64 --ignore-eos
      dovetail bench offline smollm2-135m --input prompts.jsonl --use ngram --against plain --json offline.json
    """
    sides = settings(engine, against)
    from dovetail import hub
    from dovetail.bench.engine.offline import Asked, run

    with terminal.status(f"finding {model}"):
        hub.resolve(model)
    count = rounds or (1 if against is None else ROUNDS)
    asked = Asked(
        model, sides, source, count, lambda llm, ids: terminal.params_for(llm, ids, sampling, MAX_TOKENS), limit
    )
    found = run(asked) | {"sampling": dict(sampling.given)}
    show(found, SHOWN)
    _notes(found)
    write_json(json_file, found)
    if any(side["failed"] for side in (found, found.get("against", found))):
        note("some prompts could not be answered")
        raise typer.Exit(1)
    finish(found)


def _notes(found: dict[str, Any]) -> None:
    broken, unknown = found["broken"], found["unknown_fields"]
    if broken["count"]:
        note(f"{broken['count']} broken lines were left out; the first:")
        for entry in broken["first"]:
            note(f"  line {entry['line']}: {entry['error']}")
    if unknown:
        note(f"fields that mean nothing here were ignored: {', '.join(unknown[:20])}")
