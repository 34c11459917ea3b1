"""`dovetail advise`: which setting of a model is best for a workload on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.engine_options import EngineOptions, OptionGroup, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError
from dovetail.show.plot import PlotOption
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.advise.run import Asked
    from dovetail.advise.workload import Workload
    from dovetail.checkpoint import Checkpoint
    from dovetail.evals.journal import Journal
    from dovetail.setting import Setting

EXIT_MISSED = 1


def _load(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Workload", **more)


def _text(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Loss", **more)


_WORKLOAD = "chat, summarise, batch, or a trace as `bench serve` reads. Repeat for more. Default: those three."


@dataclass(frozen=True)
class WorkloadOptions(OptionGroup):
    """What the machine is asked to do."""

    workload: Annotated[list[str] | None, _load("--workload", _WORKLOAD, metavar="NAME|TRACE")] = None
    prompt_tokens: Annotated[
        int | None, _load("--prompt-tokens", "Tokens of a prompt, instead of --workload.")
    ] = None
    output_tokens: Annotated[int | None, _load("--output-tokens", "Tokens of an answer, likewise.")] = None
    concurrency: Annotated[
        int | None, _load("--concurrency", "Requests at once, of these or of a trace. Default: 1, of a trace 8.")
    ] = None
    requests: Annotated[
        int | None, _load("--requests", "Requests of a trace that count, from its start. Default: 32.", min=1)
    ] = None

    def check(self) -> None:
        """ConfigError for options that exclude each other or are impossible."""
        lengths = (self.prompt_tokens, self.output_tokens)
        names = self.workload or []
        if names and lengths != (None, None):
            raise ConfigError(
                "--workload and --prompt-tokens exclude each other: a workload has lengths of its own"
            )
        if (lengths[0] is None) != (lengths[1] is None):
            raise ConfigError("--prompt-tokens and --output-tokens are given together")
        traces = [name for name in names if not _built_in(name)]
        if self.concurrency is not None and lengths[0] is None and not traces:
            raise ConfigError("--concurrency is for a trace, or for --prompt-tokens and --output-tokens")
        if self.requests is not None and not traces:
            raise ConfigError("--requests is for a trace")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {self.concurrency}")
        for name in traces:
            _trace(name)

    def workloads(self, checkpoint: Checkpoint, context: int) -> list[Workload]:
        """What to measure, for an engine with a context of so many tokens."""
        from dovetail.advise.workload import BUILT_IN, synthetic

        if self.prompt_tokens is not None and self.output_tokens is not None:
            return [synthetic(self.prompt_tokens, self.output_tokens, self.concurrency or 1)]
        names = dict.fromkeys(self.workload or BUILT_IN)
        return [BUILT_IN[n] if _built_in(n) else self._traced(n, checkpoint, context) for n in names]

    def _traced(self, name: str, checkpoint: Checkpoint, context: int) -> Workload:
        from dovetail.advise.workload import CONCURRENCY, TRACED, traced
        from dovetail.bench.serving.workload import Limits

        tokenizer = checkpoint.tokenizer()
        limits = Limits(context=context, rows=self.requests or TRACED)
        found, rows = traced(
            _trace(name), self.concurrency or CONCURRENCY, limits, lambda text: len(tokenizer.encode(text))
        )
        if rows.trace.broken:
            note(f"{name}: {rows.trace.broken} broken lines are left out; the first is {rows.trace.reason}")
        if rows.skipped:
            note(f"{name}: {rows.skipped} requests are longer than the context of {context} tokens")
        return found


@dataclass(frozen=True)
class LossOptions(OptionGroup):
    """How the loss of rounding is measured, and how much is taken."""

    max_loss: Annotated[
        str, _text("--max-loss", "The most perplexity that a setting may cost, as in 1% or 0.01.")
    ] = "1%"
    corpus: Annotated[str | None, _text("--corpus", "Text to measure on, as in `eval`. Default: pydoc.")] = None
    data: Annotated[Path | None, _text("--data", "Folder that holds the corpora that go by name.")] = None
    windows: Annotated[int, _text("--windows", "Windows of 512 tokens of the corpus.", min=1)] = 8

    @property
    def most(self) -> float:
        """The largest loss as a share. ConfigError if it is no share."""
        number, percent, rest = self.max_loss.strip().partition("%")
        try:
            value = float(number) / (100 if percent else 1)
        except ValueError:
            value = -1.0
        if rest or not 0 <= value < 1:
            raise ConfigError(f"--max-loss {self.max_loss}: write a share from 0 to below 1, as in 1% or 0.01")
        return value


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    workload: WorkloadOptions,
    loss: LossOptions,
    engine: EngineOptions,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Settings to compare instead of those that suit MODEL, as in `eval`. Repeat for more."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another checkpoint of MODEL to compare. Repeat for more."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often speeds are measured, in turns.")] = 5,
    check: Annotated[bool, typer.Option("--check", help="Run each workload with each setting too.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget losses that an interrupted run measured.")
    ] = False,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Say which setting of MODEL suits a workload here, and why.

    Each setting runs in a process of its own. Its loss is the perplexity of a short text, compared with the least
    rounded setting. Prompts and decoding are timed, settings in turns, and predict the time of the workload. The
    fastest one that loses at most --max-loss is recommended. With --check the workloads are run as a whole too:
    exit status 1 means that the recommended setting is more than 5 % slower than the fastest. Run it on an
    otherwise idle machine.

    \b
    Examples:
      dovetail advise MODEL --workload chat
      dovetail advise MODEL --also MODEL-w4a16 --also MODEL-w8a8-int8 --max-loss 2% --plot advice.png
      dovetail advise MODEL --prompt-tokens 2000 --output-tokens 100 --concurrency 8 --check
      dovetail advise MODEL --workload azure.csv --concurrency 16 --sweep w4a16:group=32,64,128
    """
    workload.check()
    most = loss.most
    model_checkpoint = _checkpoint(model)
    context = min(model_checkpoint.config.max_position_embeddings, engine.options.max_model_len or sys.maxsize)
    workloads = workload.workloads(model_checkpoint, context)
    base = _base(engine, workloads)
    from dovetail.advise.candidates import candidates
    from dovetail.advise.run import Asked
    from dovetail.text.corpus import DEFAULT

    found = candidates(model, model_checkpoint, base, sweep or [], also or [])
    text = (loss.corpus or DEFAULT, loss.data, loss.windows)
    asked = Asked(found, workloads, *text, rounds=rounds, most=most, check=check)
    finish(model, asked, _journal(asked, fresh), plot, json_file)


def finish(model: str, asked: Asked, journal: Journal, plot: Path | None, json_file: str | None) -> None:
    """Measure, show and judge."""
    from dovetail.advise import report
    from dovetail.advise.run import run
    from dovetail.core.technique import idle
    from dovetail.provenance import provenance

    tried, advised = run(asked, journal)
    print("\n\n".join(report.shown(found, tried) for found in advised))
    if plot is not None:
        from dovetail.show.plot import save

        save(report.draw(advised, model), plot)
    facts = {"max_loss": asked.most, "corpus": asked.corpus, "windows": asked.windows, "rounds": asked.rounds}
    write_json(json_file, {"model": model, **facts, **report.plain(tried, advised), **provenance()})
    journal.remove()
    for one in tried:
        if names := idle(one.activity):
            note(f"{one.name}: {', '.join(names)} never acted")
    if any(found.checked is not None and not found.checked["meets"] for found in advised):
        raise typer.Exit(EXIT_MISSED)


def _checkpoint(model: str) -> Checkpoint:
    from dovetail import hub
    from dovetail.models import open_checkpoint

    return open_checkpoint(hub.resolve(model))


def _base(engine: EngineOptions, workloads: Sequence[Workload]) -> Setting:
    """The engine's options for all settings, with room for all requests that run at once."""
    from dovetail.config import DEFAULT_SEQS
    from dovetail.setting import Setting
    from dovetail.techniques import technique

    for spec in engine.use:
        technique(spec)  # known before a model is loaded
    options, most = engine.options, max(w.at_once for w in workloads)
    if options.max_num_seqs is None and most > DEFAULT_SEQS:
        options = replace(options, max_num_seqs=most)
    return Setting("plain", engine.use, options)


def _journal(asked: Asked, fresh: bool) -> Journal:
    """Losses that an interrupted run of the same settings measured on the same text."""
    from dovetail.evals.journal import Journal
    from dovetail.evals.run import file_facts
    from dovetail.provenance import commit, versions

    settings = [
        (c.name, c.model, file_facts(c.model), c.setting.use, vars(c.setting.options)) for c in asked.candidates
    ]
    text = [asked.corpus, file_facts(asked.corpus), asked.data, asked.windows]
    journal = Journal({"advise": settings, "text": text, "program": [versions(), commit()]}, fresh)
    if journal.found:
        note(f"{len(journal.found)} losses are an interrupted run's (--fresh: anew)")
    return journal


def _built_in(name: str) -> bool:
    from dovetail.advise.workload import BUILT_IN

    return name in BUILT_IN


def _trace(name: str) -> Path:
    """The file of a trace. ConfigError if there is none."""
    from dovetail.advise.workload import BUILT_IN

    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--workload {name}: it is none of {', '.join(BUILT_IN)}, and there is no such file")
    return path
