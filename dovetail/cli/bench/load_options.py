"""Options of a load: when requests are sent, and what is in them."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.bench.serving.arrivals import Arrivals, Pattern
from dovetail.bench.serving.request import Asking, Endpoint
from dovetail.bench.serving.slo import SLO
from dovetail.bench.serving.sweep import AUTO, parse_rates
from dovetail.bench.serving.trace import Kind, Trace
from dovetail.bench.serving.workload import Lengths, Limits, Rows, Synthetic
from dovetail.cli.engine_options import OptionGroup
from dovetail.core.errors import ConfigError, RequestError
from dovetail.host.units import parse_duration

if TYPE_CHECKING:
    from dovetail.bench.serving.benchmark import Plan

DEFAULT_RATE = "1"
DEFAULT_TIMEOUT = "600s"
_INPUT, _OUTPUT = "128", "64"


class Prompts(enum.StrEnum):
    """What random prompts are sent as."""

    AUTO = "auto"
    IDS = "ids"
    TEXT = "text"


def _load(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Load", **more)


def _ask(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Requests", **more)


_RATE = "Requests per second: 2, 1,2,4, 1..32 (doubling), max (all at once), or auto (to saturation). Default: 1."
_REQUESTS = "Requests at each rate. Default: those of 30 seconds, at least 100, or all of a replayed trace."
_DURATION = "Send only what is due within this time."
_SPEED = "Replay a trace this many times as fast as it was. Default: 1."
_SLO = "Limits of a good request, as in ttft=500ms,tpot=50ms,e2e=10s."
_DURATIONS: dict[str, Any] = {"metavar": "DURATION"}


@dataclass(frozen=True)
class LoadOptions(OptionGroup):
    """When requests are sent."""

    rate: Annotated[str | None, _load("--rate", _RATE, metavar="RATES")] = None
    arrivals: Annotated[Pattern | None, _load("--arrivals", "Gaps between requests. Default: poisson.")] = None
    cv: Annotated[float | None, _load("--cv", "Coefficient of variation of bursty gaps. Default: 2.")] = None
    requests: Annotated[int | None, _load("--requests", _REQUESTS, min=1)] = None
    duration: Annotated[str | None, _load("--duration", _DURATION, **_DURATIONS)] = None
    speed: Annotated[float | None, _load("--speed", _SPEED)] = None
    max_concurrency: Annotated[
        int | None, _load("--max-concurrency", "Hold requests back while this many are open.", min=1)
    ] = None
    warmup: Annotated[int, _load("--warmup", "Requests sent first, one by one, and not counted.", min=0)] = 1
    slo: Annotated[str | None, _load("--slo", _SLO, metavar="LIMITS")] = None
    rounds: Annotated[int, _load("--rounds", "Loads at each rate; shown are their medians.", min=1)] = 1

    def plan(self, kind: Kind | None) -> Plan:
        """The loads to run on a trace of this kind, or on synthetic requests. Raises ConfigError."""
        from dovetail.bench.serving.benchmark import Plan

        replay = self._replays(kind)
        self._check(replay)
        rates = None
        if not replay and self.rate != AUTO:
            rates = parse_rates(self.rate or DEFAULT_RATE)
            if math.inf in rates and self.requests is None and self.duration is not None:
                raise ConfigError("--rate max sends everything at once: say how much with --requests")
        if not replay and self.rate == AUTO and not self.warmup:
            raise ConfigError(
                "--rate auto begins at a rate that a warm-up request suggests; --warmup must be 1 or more"
            )
        arrivals = Arrivals(self.arrivals or Pattern.POISSON, 2.0 if self.cv is None else self.cv)
        speed = (1.0 if self.speed is None else self.speed) if replay else None
        slo = None if self.slo is None else SLO.parse(self.slo)
        return Plan(arrivals, rates, speed, self.warmup, self.max_concurrency, slo, self.rounds)

    def limits(self, kind: Kind | None, input_tokens: int | None, context: int | None) -> Limits:
        """What a load of this kind may hold, for servers with this context."""
        duration = None if self.duration is None else seconds("--duration", self.duration)
        limits = Limits(self.requests, duration, input_tokens, context)
        return replace(limits, rows=self.requests if self._replays(kind) else self._rows(limits))

    def _rows(self, limits: Limits) -> int | None:
        """Rows of a trace that all loads take together; None if that is not known before they run."""
        if self.rate == AUTO:
            return None
        each = [limits.of(rate) for rate in parse_rates(self.rate or DEFAULT_RATE)]
        return None if None in each else self.warmup + self.rounds * sum(filter(None, each))

    def _replays(self, kind: Kind | None) -> bool:
        return kind is not None and kind.timed and self.rate is None

    def _check(self, replay: bool) -> None:
        if replay and self.arrivals is not None:
            raise ConfigError("--arrivals needs --rate: without it, requests are sent at the trace's own times")
        if self.cv is not None and self.arrivals is not Pattern.BURSTY:
            raise ConfigError("--cv is for --arrivals bursty")
        if self.speed is not None and not replay:
            raise ConfigError("--speed is for a --trace with times that is replayed, without --rate")
        if self.speed is not None and not (math.isfinite(self.speed) and self.speed > 0):
            raise ConfigError(f"--speed {self.speed:g} must be above 0")
        if self.duration is not None:
            seconds("--duration", self.duration)


_TRACE = "Take lengths and times from an Azure .csv, a Mooncake .jsonl or a ShareGPT .json."
_TOKENS: dict[str, Any] = {"metavar": "N|LOW:HIGH"}
_FILE: dict[str, Any] = {"metavar": "FILE", "exists": True, "dir_okay": False}


@dataclass(frozen=True)
class AskOptions(OptionGroup):
    """What is in the requests, and how they are sent."""

    input_tokens: Annotated[
        str | None, _ask("--input-tokens", f"Tokens of a prompt. Default: {_INPUT}.", **_TOKENS)
    ] = None
    output_tokens: Annotated[
        str | None, _ask("--output-tokens", f"Tokens of an answer. Default: {_OUTPUT}.", **_TOKENS)
    ] = None
    trace: Annotated[Path | None, _ask("--trace", _TRACE, **_FILE)] = None
    scale_lengths: Annotated[
        float | None, _ask("--scale-lengths", "Multiply a trace's lengths by this, as 0.1.")
    ] = None
    max_input_tokens: Annotated[
        int | None, _ask("--max-input-tokens", "Leave out a trace's prompts that are longer.", min=1)
    ] = None
    endpoint: Annotated[Endpoint, _ask("--endpoint", "What to ask the server for.")] = Endpoint.COMPLETIONS
    prompts: Annotated[
        Prompts, _ask("--prompts", "Send token ids or text. auto: ids if each target is the same MODEL.")
    ] = Prompts.AUTO
    tokenizer: Annotated[
        str | None, _ask("--tokenizer", "MODEL whose tokens make prompts. Default: the target's.")
    ] = None
    model: Annotated[str | None, _ask("--model", "Name to ask a running server for. Default: its first.")] = None
    api_key: Annotated[str | None, _ask("--api-key", "Key that a running server wants.")] = None
    ignore_eos: Annotated[
        bool, _ask("--ignore-eos/--no-ignore-eos", "Ask for answers of full length; not all servers can.")
    ] = True
    timeout: Annotated[str, _ask("--timeout", "Time for a whole answer.", **_DURATIONS)] = DEFAULT_TIMEOUT

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other with any target."""
        given = {"--input-tokens": self.input_tokens, "--output-tokens": self.output_tokens}
        if self.trace is not None and (clash := [flag for flag, value in given.items() if value is not None]):
            raise ConfigError(f"{clash[0]} and --trace exclude each other: a trace has lengths of its own")
        needing = {"--scale-lengths": self.scale_lengths, "--max-input-tokens": self.max_input_tokens}
        if self.trace is None and (alone := [flag for flag, value in needing.items() if value is not None]):
            raise ConfigError(f"{alone[0]} is for a --trace")
        if self.scale_lengths is not None and not 0 < self.scale_lengths <= 1:
            raise ConfigError(f"--scale-lengths {self.scale_lengths:g} must be above 0 and at most 1")
        if self.prompts is Prompts.IDS and self.endpoint is Endpoint.CHAT:
            raise ConfigError("--prompts ids needs --endpoint completions: a chat message is text")
        if self.api_key is not None and not (self.api_key.strip() and self.api_key.isprintable()):
            raise ConfigError("--api-key must be printable and not empty")

    def asking(self) -> Asking:
        """How each request is sent. Raises ConfigError."""
        timeout = seconds("--timeout", self.timeout)
        return Asking(self.endpoint, self.ignore_eos, timeout, self.api_key)

    def open_trace(self, count: Callable[[str], int]) -> Trace | None:
        """The trace, not read yet; `count` gives the tokens of a text."""
        if self.trace is None:
            return None
        trace = Trace(self.trace, count)
        if trace.kind is Kind.SHAREGPT and self.scale_lengths is not None:
            raise ConfigError("--scale-lengths is for traces of lengths; a ShareGPT trace has prompts as they are")
        return trace

    def rows(self, trace: Trace, limits: Limits) -> Rows:
        """The requests of `trace`. RequestError if there is none that a server can answer."""
        rows = Rows(trace, limits, self.scale_lengths or 1.0)
        if rows.found:
            return rows
        if rows.skipped:
            raise RequestError(
                f"{trace.path}: each of its {rows.skipped} requests is longer than the context "
                f"({limits.context or 'unknown'} tokens) or --max-input-tokens; try --scale-lengths 0.1"
            )
        raise RequestError(f"{trace.path}: holds no request" + (f"; {trace.reason}" if trace.reason else ""))

    def synthetic(self, seed: int) -> Synthetic:
        """Requests of random lengths. Raises ConfigError."""
        return Synthetic(
            Lengths.parse(self.input_tokens or _INPUT, "--input-tokens"),
            Lengths.parse(self.output_tokens or _OUTPUT, "--output-tokens"),
            seed,
        )


def seconds(flag: str, text: str) -> float:
    """A duration above 0. ConfigError names `flag`."""
    try:
        found = parse_duration(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None
    if found <= 0:
        raise ConfigError(f"{flag} {text} must be above 0")
    return found
