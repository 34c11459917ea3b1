"""`dovetail bench serve`: a load on a server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.bench.asking import Endpoint
from dovetail.cli import EXIT_INTERRUPTED
from dovetail.cli.engine_options import EngineOptions, spliced
from dovetail.cli.load_options import AskOptions, LoadOptions, Prompts
from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError
from dovetail.plot import PlotOption
from dovetail.progress import note

if TYPE_CHECKING:
    from dovetail.bench.serving import Plan, ServingBench
    from dovetail.bench.target import Target
    from dovetail.bench.trace import Trace
    from dovetail.bench.vocabulary import Vocabulary
    from dovetail.bench.workload import Rows, Workload

EXIT_FAILED = 1


@spliced
def command(
    target: Annotated[str, typer.Argument(help="Address of a running server, or a model to serve.")],
    load: LoadOptions,
    ask: AskOptions,
    engine: EngineOptions,
    against: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Put the same load on this target too, in turns.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each request.", dir_okay=False)
    ] = None,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Measure an OpenAI-compatible server under load.

    TARGET is the address of a running server, or a model, for which a server is started with the engine options.
    Requests are sent when they are due, whatever is outstanding (open loop). Times are of whole requests as a
    client sees them: TTFT to the first text, TPOT per token after it, ITL between pieces of text, E2E to the end.

    \b
    Examples:
      dovetail bench serve smollm2-135m --rate 1..32 --slo ttft=500ms,tpot=50ms --plot sweep.png
      dovetail bench serve http://127.0.0.1:8000 --rate auto --against http://127.0.0.1:8001
      dovetail bench serve smollm2-135m --trace azure.csv --speed 2 --duration 60s --scale-lengths 0.25
    """
    setup = _Setup([target] if against is None else [target, against], load, ask, engine)
    setup.check()
    if plot_file is not None and load.rate == "max":
        raise ConfigError("--plot draws against the offered rate, and --rate max has none")
    from dovetail.bench.record_file import record_file

    vocabulary = setup.vocabulary()
    with record_file(records) as keep:
        try:
            measured = asyncio.run(_measure(setup, vocabulary, keep))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    _hand_over(measured, json_file, plot_file)


@dataclass(frozen=True)
class _Setup:
    """What was asked on the command line. The seed of the load is the engine's."""

    names: Sequence[str]
    load: LoadOptions
    ask: AskOptions
    engine: EngineOptions

    @property
    def seed(self) -> int:
        return self.engine.options.seed

    @property
    def models(self) -> list[str]:
        """The targets for which servers are started."""
        from dovetail.bench.target import server_url

        return [name for name in self.names if server_url(name) is None]

    @property
    def labels(self) -> list[str]:
        """What the targets are called in the result; each is different."""
        first, *rest = self.names
        return [first, *(f"{name} (again)" if name == first else name for name in rest)]

    def check(self) -> None:
        """Raise ConfigError for what is impossible, before anything is started."""
        from dovetail.bench.target import server_url

        self.ask.check()
        self.ask.asking()
        self.ask.synthetic(self.seed)
        trace = self.ask.open_trace(len)
        self.load.plan(trace.kind if trace else None)
        models, urls = self.models, [url for name in self.names if (url := server_url(name))]
        if len(urls) == 2 and urls[0] == urls[1]:
            raise ConfigError("TARGET and --against are the same server; its prefix cache would know each prompt")
        words = [w for w in self.engine.words() if w.startswith("--") and w != "--seed"]
        if not models and words:
            raise ConfigError(f"{words[0]} sets up an engine, but {urls[0]} runs already; give it to that server")
        for flag, value in (("--model", self.ask.model), ("--api-key", self.ask.api_key)):
            if value is not None and not urls:
                raise ConfigError(f"{flag} is for a server that runs already; {models[0]} is started here")

    def vocabulary(self) -> Vocabulary:
        """What prompts are made of: ids where each target serves the same model here, else text."""
        from dovetail import hub
        from dovetail.bench import vocabulary
        from dovetail.checkpoint import open_checkpoint

        for model in self.models:
            hub.resolve(model)  # a download shows its progress here
        known = self.ask.tokenizer or next(iter(self.models), None)
        ids = self.ask.prompts is Prompts.IDS
        if self.ask.prompts is Prompts.AUTO and self.ask.endpoint is Endpoint.COMPLETIONS:
            ids = len(self.models) == len(self.names) and len(set(self.models)) == 1
        if known is None:
            if ids:
                raise ConfigError("--prompts ids needs the model's tokenizer: name the model with --tokenizer")
            return vocabulary.words()
        tokenizer = open_checkpoint(hub.resolve(known)).tokenizer()
        return vocabulary.token_ids(tokenizer) if ids else vocabulary.token_text(tokenizer)


@dataclass(frozen=True)
class _Measured:
    bench: ServingBench
    setup: _Setup
    workload: dict[str, Any]


async def _measure(setup: _Setup, vocabulary: Vocabulary, keep: Callable[..., None]) -> _Measured:
    """Start what is to be started, run the loads, end what was started."""
    from dovetail.bench.client import session
    from dovetail.bench.serving import ServingBench
    from dovetail.bench.target import Opening, opened

    bench: ServingBench | None = None
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        if bench is not None and not bench.over:
            bench.stop.interrupt()
        else:
            task.cancel()

    with _on_signals(interrupt):
        trace = setup.ask.open_trace(vocabulary.count)
        opening = Opening(setup.ask.model, setup.ask.asking(), setup.engine.words())
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(session())
            targets = [
                await stack.enter_async_context(opened(name, label, http, opening))
                for name, label in zip(setup.names, setup.labels, strict=True)
            ]
            plan = setup.load.plan(trace.kind if trace else None)
            workload, rows = _workload(setup, vocabulary, trace, targets)
            bench = ServingBench(targets, workload, plan)
            await bench.run(keep)
            await _tell_ends(targets)
    return _Measured(bench, setup, _describe(setup, plan, workload, rows))


@contextlib.contextmanager
def _on_signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on Ctrl-C and SIGTERM; off the main thread signals are left as they are."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    with contextlib.suppress(RuntimeError, ValueError):
        for number in signals:
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _workload(
    setup: _Setup, vocabulary: Vocabulary, trace: Trace | None, targets: Sequence[Target]
) -> tuple[Workload, Rows | None]:
    from dovetail.bench.workload import Workload, check_synthetic

    context = min((t.served.context for t in targets if t.served.context), default=None)
    limits = setup.load.limits(trace.kind if trace else None, setup.ask.max_input_tokens, context)
    if trace is None:
        synthetic = setup.ask.synthetic(setup.seed)
        check_synthetic(synthetic, limits)
        return Workload(synthetic, vocabulary, limits, setup.seed), None
    rows = setup.ask.rows(trace, limits)
    if trace.broken:
        note(f"{trace.path}: {trace.broken} broken lines are left out; the first is {trace.reason}")
    if rows.skipped:
        note(f"{trace.path}: {rows.skipped} requests are longer than the context or --max-input-tokens")
    return Workload(rows.found, vocabulary, limits, setup.seed, rows.block), rows


async def _tell_ends(targets: Sequence[Target]) -> None:
    """Say which of the servers that were started here have ended by themselves."""
    for target in targets:
        if target.process is not None and (code := target.process.process.returncode) is not None:
            note(f"{target.label}: its server ended with exit code {code}: {target.process.last_words()}")


def _describe(setup: _Setup, plan: Plan, workload: Workload, rows: Rows | None) -> dict[str, Any]:
    """The workload in the JSON result."""
    ask, limits, replay = setup.ask, workload.limits, plan.speed is not None
    found: dict[str, Any] = {
        "endpoint": ask.endpoint.value,
        "prompts": "ids" if workload.vocabulary.ids else "text",
        "ignore_eos": ask.ignore_eos,
        "arrivals": "trace" if replay else plan.arrivals.pattern.value,
        "cv": plan.arrivals.cv if plan.arrivals.pattern == "bursty" else None,
        "speed": plan.speed,
        "requests": limits.requests,
        "duration_s": limits.duration,
        "warmup": plan.warmup,
        "max_concurrency": plan.max_concurrency,
        "seed": setup.seed,
        "trace": None,
    }
    if rows is None:
        lengths = ask.synthetic(setup.seed)
        return found | {"input_tokens": vars(lengths.input_tokens), "output_tokens": vars(lengths.output_tokens)}
    trace = {
        "file": rows.trace.path.name,
        "kind": rows.trace.kind.value,
        "requests": len(rows.found),
        "broken": rows.trace.broken,
        "skipped": rows.skipped,
        "scale_lengths": ask.scale_lengths or 1.0,
        "block_tokens": rows.block if any(row.blocks for row in rows.found) else None,
        "lengths_counted": workload.vocabulary.exact or rows.trace.kind != "sharegpt",
    }
    return found | {"trace": trace}


def _hand_over(measured: _Measured, json_file: str | None, plot_file: Path | None) -> None:
    """Print, draw and write what was measured, and exit with what it means."""
    from dovetail.bench.serving_plot import draw
    from dovetail.bench.serving_table import highest, report

    bench = measured.bench
    if bench.points:
        print(report(bench.points))
    if plot_file is not None and bench.points:
        draw(bench.points, plot_file)
    if json_file is not None:
        from dovetail.provenance import provenance

        slo = bench.plan.slo
        result = {
            "suite": "serve",
            "targets": [target.to_dict() for target in bench.targets],
            "workload": measured.workload,
            "slo": None if slo is None else slo.to_dict(),
            "points": bench.points,
            "highest_rates": highest(bench.points),
            "ended_early": bench.stop.reason,
        }
        write_json(json_file, result | provenance())
    if bench.stop.interrupted:
        note("interrupted; this is what was measured so far")
        raise typer.Exit(EXIT_INTERRUPTED)
    if bench.stop.gone:
        note("a server is gone; this is what was measured before")
    if bench.stop.gone or not all(point["completed"] for point in bench.points):
        raise typer.Exit(EXIT_FAILED)
