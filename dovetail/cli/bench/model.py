"""`dovetail bench model`: rates at fixed points, latency, memory and start-up."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dovetail.cli import terminal
from dovetail.cli.bench.report import AGAINST_HELP, ROUNDS_HELP, finish, settings, show
from dovetail.cli.engine_options import EngineOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.show.progress import note

ROUNDS, QUICK_ROUNDS = 5, 2
STARTS, QUICK_STARTS = 3, 1

# How a figure is shown: its name, its unit, and the factor to that unit.
SHOWN = {
    "prefill_tokens_per_s": ("prompt of", "tokens/s", 1.0),
    "decode_tokens_per_s": ("decode, context", "tokens/s", 1.0),
    "streams_tokens_per_s": ("streams,", "tokens/s", 1.0),
    "latency_ms": ("latency", "ms/token", 1.0),
    "bytes_per_token": ("read, context", "MB/token", 1e-6),
    "roofline_fraction": ("of bandwidth, context", "", 1.0),
    "read_bandwidth": ("raw read", "GB/s", 1.0),
    "startup_s": ("start-up", "s", 1.0),
    "peak_rss": ("peak memory", "MB", 1e-6),
}


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    engine: EngineOptions,
    against: Annotated[str | None, typer.Option(metavar="SPEC", help=AGAINST_HELP)] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help=f"{ROUNDS_HELP} Default: {ROUNDS}.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Short answers, {QUICK_ROUNDS} rounds, one start.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Time MODEL at fixed points.

    Prompts of 128 to 2048 tokens, one answer behind 16 to 4096 tokens, 8 and 32 answers at once; the time of a
    token, the bytes that it reads and the share of the machine's bandwidth that this is; start-up and peak memory
    of a new process. Prompts are new random tokens, so no prefix cache helps. Shown are medians of the rounds with
    the lowest and the highest. Run it on an otherwise idle machine.

    \b
    Examples:
      dovetail bench model smollm2-135m --json model.json
      dovetail bench model smollm2-135m --use sink-window:window=256 --against plain
      dovetail bench model smollm2-135m --against kv-cache-dtype=int8 --rounds 10
    """
    sides = settings(engine, against)
    from dovetail import hub
    from dovetail.bench.engine.model import Asked, run

    with terminal.status(f"finding {model}"):
        hub.resolve(model)  # a download does not count as start-up
    count = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    found = run(Asked(model, sides, count, QUICK_STARTS if quick else STARTS, quick))
    show(found, SHOWN)
    _notes(found)
    write_json(json_file, found)
    finish(found)


def _notes(found: dict[str, Any]) -> None:
    for side in (found, found.get("against", {"skipped": []})):
        where = "" if side is found else f"{side.get('setting')}: "
        for entry in side["skipped"]:
            note(f"{where}{entry['figure']} skipped: {entry['why']}")
