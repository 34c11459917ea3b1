"""`dovetail eval`: how good a model's answers are with a technique, and how fast they come, in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.engine_options import EngineOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.cli.suite_options import SuiteOptions
from dovetail.core.errors import ConfigError
from dovetail.evals import SUITES
from dovetail.show.plot import PlotOption
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.evals.bounds import Bound
    from dovetail.evals.journal import Journal
    from dovetail.evals.run import Run
    from dovetail.evals.suite import Result, Suite

EXIT_MISSED = 1

CompareOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="An earlier result, with whose answers these are paired.",
        exists=True,
        dir_okay=False,
    ),
]


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")],
    suite_options: SuiteOptions,
    engine: EngineOptions,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings to compare, as in ngram:tokens=2,4 or kv-cache-dtype=bf16,int8. Repeat for more."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Reference: plain, exact, or parts as in --sweep.", show_default=False),
    ] = None,
    compare: CompareOption = None,
    least: Annotated[
        list[str] | None, typer.Option("--min", metavar="KEY=N", help="Exit with 1 if a figure is below. Repeat.")
    ] = None,
    most: Annotated[
        list[str] | None, typer.Option("--max", metavar="KEY=N", help="Exit with 1 if a figure is above. Repeat.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on where an interrupted run ended.")] = False,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure how good MODEL's answers are, and how fast.

    Everything runs through the engine that serves, so quality and speed are of the same run. A technique that was
    in use and never acted makes the measurement an error (exit 1). Without --against, comparisons are with the
    engine without techniques, or in float32 (exact) if no technique is in use. Answers to the same questions are
    paired: with those of --compare, else of the first setting.

    \b
    Examples:
      dovetail eval smollm2-135m --suite perplexity
      dovetail eval smollm2-135m --suite divergence --sweep kv-cache-dtype=bf16,int8,int4 --plot kl.png
      dovetail eval smollm2-135m --suite perplexity --use sink-window:window=256 --max perplexity=20
      dovetail eval smollm2-135m --suite gsm8k --data test.jsonl --sweep kv-cache-dtype=int8,int4
      dovetail eval smollm2-135m --suite needle --lengths 1024..4096 --plot heat.png
    """
    from dovetail.evals.journal import Journal

    asked = _asked(model, suite, suite_options, engine, sweep or [], against)
    asked = replace(asked, earlier=None if compare is None else _earlier(asked.suite, compare))
    bounds = [*_bounds(asked, least or [], "--min"), *_bounds(asked, most or [], "--max")]
    asked = replace(asked, bounds=bounds)
    journal = Journal(asked.key, fresh)
    results = _results(asked, journal)
    if len(asked.settings) > 1:
        print(_table(asked.suite, results))
    if plot is not None:
        from dovetail.show.plot import save

        save(asked.suite.draw(results), plot)
    write_json(json_file, _json(asked, results))
    journal.remove()
    _judge(asked, results)


def _results(asked: Run, journal: Journal) -> list[Result]:
    """What is measured, and what an interrupted run left."""
    from dovetail.evals.run import run

    total = len(asked.settings)
    if journal.found:
        note(f"{len(journal.found)} of {total} results are an interrupted run's (--fresh: anew)")
    try:
        return run(asked, journal, lambda result: _say(asked, result))
    except KeyboardInterrupt:
        if journal.found:
            note(f"\n{len(journal.found)} of {total} results are kept: the same command goes on")
        raise


def _asked(
    model: str, name: str, options: SuiteOptions, engine: EngineOptions, sweep: Sequence[str], against: str | None
) -> Run:
    from dovetail.evals import find
    from dovetail.evals.run import Run
    from dovetail.evals.suite import build
    from dovetail.setting import Setting, parse_setting, parse_sweep
    from dovetail.techniques import technique

    for spec in engine.use:  # what the user asked for must exist, even if only other settings are measured
        technique(spec)
    kind = find(name)
    plain = Setting("plain", (), engine.options)
    base = Setting("+".join(engine.use) or "plain", engine.use, engine.options)
    settings = {base.name: base}
    for text in sweep:
        for setting in parse_sweep(text, base):
            named = Setting("+".join([*engine.use, setting.name]), setting.use, setting.options)
            settings.setdefault(named.name, named)
    reference = parse_setting(against, plain) if against is not None else None
    if kind.compares and reference is None:
        uses = any(s.use for s in settings.values())
        reference = parse_setting("plain" if uses else "exact", plain)
    if not kind.compares and reference is not None:
        settings = {reference.name: reference, **{n: s for n, s in settings.items() if n != reference.name}}
        reference = None
    return Run(build(kind, options.given), model, list(settings.values()), reference)


def _earlier(suite: Suite, path: Path) -> Result:
    """The result in a file, with which those of `suite` can be paired. ConfigError says why they cannot."""
    from dovetail.bench.compare import load

    found = load(path)
    found = next((r for r in found.get("results", ()) if "items" in r), found)  # of several, the first measured
    digest = suite.questions()
    if digest is None:
        raise ConfigError(f"--compare: the suite {suite.name} has no questions that are answered right or wrong")
    if found.get("suite") != suite.name or found.get("data_sha256") != digest or "items" not in found:
        raise ConfigError(f"--compare {path}: it is no result of the suite {suite.name} on the same questions")
    return found


def _bounds(asked: Run, texts: Sequence[str], flag: str) -> list[Bound]:
    """`accuracy=0.95` of --min or --max."""
    from dovetail.evals.bounds import DIFFERENCE, Bound

    found = []
    keys = list(asked.suite.columns)
    if asked.suite.questions() is not None and (asked.earlier is not None or len(asked.settings) > 1):
        keys.append(DIFFERENCE)
    for text in texts:
        key, equals, value = text.partition("=")
        if key not in keys or not equals:
            raise ConfigError(f"{flag} '{text}': write KEY=NUMBER with one of {', '.join(keys)}")
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise ConfigError(f"{flag} '{text}': '{value}' is not a number")
        found.append(Bound.least(key, bound) if flag == "--min" else Bound.most(key, bound))
    return found


def _say(asked: Run, result: Result) -> None:
    """Show a result: on stdout, or on stderr if a table of all results follows."""
    if "why" in result:
        note(f"{result['setting']}: {result['state']}: {result['why']}")
    if result["state"] == "refused":
        return
    text = asked.suite.text(result)
    if "paired" in result:
        text += f"\n{_paired(result['paired'])}"
    if len(asked.settings) == 1:
        print(text)
        for name, count in result["activity"].items():
            print(f"{name}: acted {count} times")
    elif asked.suite.wide:
        print(f"{result['setting']}\n{text}\n", flush=True)
    else:
        note(f"  {text}")


def _table(suite: Suite, results: Sequence[Result]) -> str:
    """One line for each setting. `best` are those that no other beats in quality and speed together."""
    from dovetail.evals.plots import pareto
    from dovetail.show.table import table

    measured = [r for r in results if r["state"] == "measured" and "decode_tokens_per_s" in r]
    sign = 1 if suite.higher else -1
    front = pareto([(r["decode_tokens_per_s"], sign * r[suite.quality]) for r in measured])
    best = {measured[i]["setting"] for i in front}
    rows = []
    pairs = any("paired" in r for r in results)
    for r in results:
        figures = [float(r[c]) if c in r else None for c in suite.columns]
        low, high = r.get("decode_spread", (None, None))
        marks = [r["state"]] if r["state"] != "measured" else ["best"] if r["setting"] in best else []
        marks += ["earlier run"] if r.get("earlier") else []
        paired = _difference(r["paired"]) if "paired" in r else ("", "")
        rows.append((r["setting"], *figures, low, high, *(paired if pairs else ()), ", ".join(marks)))
    more = ("difference", "95 %") if pairs else ()
    return table(("setting", *suite.columns, "lowest", "highest", *more, ""), rows)


def _difference(paired: dict[str, Any]) -> tuple[str, str]:
    low, high = paired["interval"]
    return f"{paired['difference']:+.1%}", f"{low:+.1%} to {high:+.1%}"


def _paired(paired: dict[str, Any]) -> str:
    """The difference in a line."""
    difference, interval = _difference(paired)
    return (
        f"{difference} from {paired['model']} {paired['to']} (95 %: {interval}) on the same {paired['questions']} "
        f"questions: {paired['gained']} gained, {paired['lost']} lost, p = {paired['p_value']:.2g}"
    )


def _json(asked: Run, results: Sequence[Result]) -> dict[str, Any]:
    from dovetail.provenance import provenance

    head = {"suite": asked.suite.name, "model": asked.model}
    if asked.reference is not None:
        head["against"] = asked.reference.name
    if len(results) == 1:
        return {**head, **results[0], **provenance()}
    return {**head, "results": list(results), **provenance()}


def _judge(asked: Run, results: Sequence[Result]) -> None:
    """Exit with 1 where a technique was idle or a bound is missed, as it is by a setting that was refused. An
    undecided bound is no failure. ConfigError where every setting was refused."""
    if all(r["state"] == "refused" for r in results):
        raise ConfigError(f"every setting was refused; the first: {results[0]['why']}")
    missed = any(r["state"] == "idle" or (asked.bounds and r["state"] == "refused") for r in results)
    for r in results:
        for bar in r.get("bars", ()):
            value = "not known" if bar["value"] is None else f"{bar['value']:g}"
            note(f"{r['setting']}: {bar['needs']}: {bar['verdict']}: it is {value} ({bar['verdict_why']})")
            missed = missed or bar["meets"] is False
    if missed:
        raise typer.Exit(EXIT_MISSED)
