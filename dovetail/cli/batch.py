"""`dovetail batch`: a file of requests, answered together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli import terminal
from dovetail.cli.engine_options import EngineOptions, SamplingOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.batch.journal import Journal
    from dovetail.batch.runner import Runner
    from dovetail.llm import LLM

# Settings that can change an answer. Rows that were finished under other settings are not reused.
_MATTERS = ("model", "use", "dtype", "kv_cache_dtype", "max_model_len", "seed")


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    input_file: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Requests, one a line.", exists=True, dir_okay=False)
    ],
    output_file: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Results, one a line.", dir_okay=False)
    ],
    engine: EngineOptions,
    sampling: SamplingOptions,
    json_file: JsonOption = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Every request of INPUT is answered and OUTPUT written in INPUT's order. Rows have custom_id, method, url
    (/v1/chat/completions or /v1/completions) and body. A row that cannot be answered gets an error in OUTPUT and
    stops nothing. Finished rows go to OUTPUT.partial at once: after a crash or Ctrl-C the same command goes on
    where it was. A row in OUTPUT or OUTPUT.partial that was answered under the same settings is never answered
    again. Sampling options hold for rows that do not give their own.

    \b
    Example:
      dovetail batch smollm2-135m requests.jsonl -o results.jsonl --max-tokens 100
    """
    if input_file.resolve() == output_file.resolve():
        raise ConfigError("INPUT and OUTPUT are the same file")
    if not output_file.parent.is_dir():
        raise ConfigError(f"{output_file.parent}: no such folder to write OUTPUT in")
    from dovetail.batch import rows
    from dovetail.batch.journal import Journal

    total = rows.count(input_file)
    journal = Journal(output_file)
    try:
        llm = terminal.load(model, engine)
        sampling.params(llm)  # an impossible value is an error of the command, not of every row
        runner = _run(llm, journal, input_file, total, sampling)
        journal.publish(runner.keys)
        _report(llm, runner, journal)
    finally:
        journal.close()
    write_json(json_file, _result(llm, model, runner))
    if runner.totals.rows and not runner.totals.answered + runner.totals.reused:
        raise typer.Exit(1)  # a script that looks only at the status must see that no row was answered


def _run(llm: LLM, journal: Journal, source: Path, total: int, sampling: SamplingOptions) -> Runner:
    from dovetail.batch import rows
    from dovetail.batch.meter import Meter
    from dovetail.batch.runner import Runner

    runner = Runner(llm, journal, sampling.given)
    meter = Meter(total)
    config = llm.config.to_dict()
    settings = [{name: config[name] for name in _MATTERS}, dict(sampling.given), llm.checkpoint.bytes]
    try:
        runner.run(rows.read(source, json.dumps(settings, sort_keys=True)), meter)
    except KeyboardInterrupt:
        meter.close()
        done = runner.totals.answered + runner.totals.reused
        note(f"{done} of {total} rows are finished; the same command goes on from there")
        raise
    finally:
        meter.close()
    return runner


def _report(llm: LLM, runner: Runner, journal: Journal) -> None:
    totals = runner.totals
    speed = totals.completion_tokens / max(totals.seconds, 1e-9)
    note(
        f"{totals.rows} rows: {totals.answered} answered, {totals.errors} errors, {totals.reused} from before; "
        f"{totals.completion_tokens} tokens in {totals.seconds:.1f}s, {speed:.1f} tokens/s"
    )
    if journal.found > totals.reused:
        note(f"{journal.found - totals.reused} earlier results are of other rows or settings and are left out")
    if totals.unknown:
        note(f"fields that mean nothing here were ignored: {', '.join(sorted(totals.unknown)[:20])}")
    if totals.answered:
        terminal.warn_idle(llm)


def _result(llm: LLM, model: str, runner: Runner) -> dict[str, Any]:
    totals = runner.totals
    return {
        "rows": totals.rows,
        "answered": totals.answered,
        "errors": totals.errors,
        "reused": totals.reused,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "seconds": totals.seconds,
        "tokens_per_s": totals.completion_tokens / max(totals.seconds, 1e-9),
        "activity": llm.activity(),
        "model": model,
        "use": list(llm.config.use),
    }
