"""`dovetail bench serve`: a load on a server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dovetail.cli import EXIT_INTERRUPTED
from dovetail.cli.bench.load_options import AskOptions, LoadOptions
from dovetail.cli.bench.load_setup import LoadSetup
from dovetail.cli.engine_options import EngineOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError
from dovetail.show.plot import PlotOption
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.bench.serving.benchmark import ServingBench
    from dovetail.bench.serving.target import Target
    from dovetail.bench.serving.vocabulary import Vocabulary

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
    setup = LoadSetup([target] if against is None else [target, against], load, ask, engine)
    setup.check()
    if plot_file is not None and load.rate == "max":
        raise ConfigError("--plot draws against the offered rate, and --rate max has none")
    if records is not None and str(records) == json_file:
        raise ConfigError(f"--records and --json both name {records}; they are different files")
    from dovetail.bench.serving.record_file import record_file

    vocabulary = setup.vocabulary()
    with record_file(records) as keep:
        try:
            measured = asyncio.run(_measure(setup, vocabulary, keep))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    _hand_over(measured, json_file, plot_file)


class _Measured(NamedTuple):
    bench: ServingBench
    workload: dict[str, Any]


async def _measure(setup: LoadSetup, vocabulary: Vocabulary, keep: Callable[..., None]) -> _Measured:
    """Start the servers, run the loads, and end the servers that were started."""
    from dovetail.bench.serving.benchmark import ServingBench
    from dovetail.bench.serving.client import session
    from dovetail.bench.serving.target import Opening, opened

    bench: ServingBench | None = None
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        if bench is None:
            task.cancel()
        else:
            bench.stop.interrupt()

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
            context = min((t.served.context for t in targets if t.served.context), default=None)
            workload, rows = setup.workload(vocabulary, trace, context)
            bench = ServingBench(targets, workload, plan)
            await bench.run(keep)
            _tell_ends(targets)
    return _Measured(bench, setup.describe(plan, workload, rows))


@contextlib.contextmanager
def _on_signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on Ctrl-C, SIGTERM and SIGHUP; off the main thread signals are left as they are."""
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signals.append(signal.SIGHUP)
    with contextlib.suppress(RuntimeError, ValueError):
        for number in signals:
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _tell_ends(targets: Sequence[Target]) -> None:
    """Say which of the servers that were started here have ended by themselves."""
    for target in targets:
        if target.process is not None and (code := target.process.process.returncode) is not None:
            note(f"{target.label}: its server ended with exit code {code}: {target.process.last_words()}")


def _idle(bench: ServingBench) -> bool:
    """Whether a technique in use never acted; says which."""
    from dovetail.core.technique import idle

    found = [(label, name) for label, counts in bench.activity.items() for name in idle(counts or {})]
    for label, name in found:
        note(f"{label}: {name} was in use but never acted; the figures are the plain engine's")
    return bool(found)


def _hand_over(measured: _Measured, json_file: str | None, plot_file: Path | None) -> None:
    """Print, draw and write what was measured, and exit with the right status."""
    from dovetail.bench.serving.plot import draw
    from dovetail.bench.serving.table import highest, report

    bench = measured.bench
    if bench.points:
        print(report(bench.points, bench.ratios))
    if plot_file is not None and bench.points:
        draw(bench.points, plot_file)
    if json_file is not None:
        from dovetail.provenance import provenance

        slo = bench.plan.slo
        result = {
            "suite": "serve",
            "targets": [t.to_dict() | {"activity": bench.activity.get(t.label)} for t in bench.targets],
            "workload": measured.workload,
            "slo": None if slo is None else slo.to_dict(),
            "rounds": bench.plan.rounds,
            "points": bench.points,
            "ratios": bench.ratios,
            "highest_rates": highest(bench.points),
            "ended_early": bench.stop.reason,
        }
        write_json(json_file, result | provenance())
    if bench.stop.interrupted:
        note("interrupted; this is what was measured so far")
        raise typer.Exit(EXIT_INTERRUPTED)
    if bench.stop.gone:
        note("a server is gone; this is what was measured before")
    idle = _idle(bench)
    if idle or bench.stop.gone or not all(point["completed"] for point in bench.points):
        raise typer.Exit(EXIT_FAILED)
