"""What the options of a load mean together: targets, prompts, requests."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dovetail.bench.serving.arrivals import Pattern
from dovetail.bench.serving.request import Endpoint
from dovetail.bench.serving.trace import Kind, Trace
from dovetail.bench.serving.workload import Rows, Workload, check_synthetic
from dovetail.cli.bench.load_options import AskOptions, LoadOptions, Prompts
from dovetail.cli.engine_options import EngineOptions
from dovetail.core.errors import ConfigError
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.bench.serving.benchmark import Plan
    from dovetail.bench.serving.vocabulary import Vocabulary


@dataclass(frozen=True)
class LoadSetup:
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
        from dovetail.bench.serving.target import server_url

        return [name for name in self.names if server_url(name) is None]

    @property
    def salt(self) -> str:
        """Makes prompts new to a server that may know those of an earlier run; nothing for one started here."""
        return "" if len(self.models) == len(self.names) else f":{secrets.token_hex(4)}"

    @property
    def labels(self) -> list[str]:
        """What the targets are called in the result; each is different."""
        first, *rest = self.names
        return [first, *(f"{name} (again)" if name == first else name for name in rest)]

    def check(self) -> None:
        """Raise ConfigError for what is impossible, before anything is started."""
        from dovetail.bench.serving.target import server_url

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
        from dovetail.bench.serving import vocabulary
        from dovetail.models import open_checkpoint

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

    def workload(
        self, vocabulary: Vocabulary, trace: Trace | None, context: int | None
    ) -> tuple[Workload, Rows | None]:
        """The requests, for servers with a context of so many tokens; of a trace also its rows."""
        limits = self.load.limits(trace.kind if trace else None, self.ask.max_input_tokens, context)
        if trace is None:
            synthetic = self.ask.synthetic(self.seed)
            check_synthetic(synthetic, limits)
            return Workload(synthetic, vocabulary, limits, self.seed, salt=self.salt), None
        rows = self.ask.rows(trace, limits)
        if trace.broken:
            note(f"{trace.path}: {trace.broken} broken lines are left out; the first is {trace.reason}")
        if rows.skipped:
            note(f"{trace.path}: {rows.skipped} requests are longer than the context or --max-input-tokens")
        return Workload(rows.found, vocabulary, limits, self.seed, rows.block, self.salt), rows

    def describe(self, plan: Plan, workload: Workload, rows: Rows | None) -> dict[str, Any]:
        """The workload in the JSON result."""
        limits, replay = workload.limits, plan.speed is not None
        found: dict[str, Any] = {
            "endpoint": self.ask.endpoint.value,
            "prompts": "ids" if workload.vocabulary.ids else "text",
            "ignore_eos": self.ask.ignore_eos,
            "arrivals": "trace" if replay else plan.arrivals.pattern.value,
            "cv": plan.arrivals.cv if plan.arrivals.pattern is Pattern.BURSTY else None,
            "speed": plan.speed,
            "requests": limits.requests,
            "duration_s": limits.duration,
            "warmup": plan.warmup,
            "max_concurrency": plan.max_concurrency,
            "seed": self.seed,
            "salt": workload.salt,
        }
        if rows is not None:
            return found | {"trace": self._trace(rows, workload.vocabulary)}
        lengths = self.ask.synthetic(self.seed)
        return found | {"input_tokens": vars(lengths.input_tokens), "output_tokens": vars(lengths.output_tokens)}

    def _trace(self, rows: Rows, vocabulary: Vocabulary) -> dict[str, Any]:
        estimated = rows.trace.kind is Kind.SHAREGPT and not vocabulary.exact
        return {
            "file": rows.trace.path.name,
            "kind": rows.trace.kind.value,
            "requests": len(rows.found),
            "broken": rows.trace.broken,
            "skipped": rows.skipped,
            "scale_lengths": self.ask.scale_lengths or 1.0,
            "block_tokens": rows.block if any(row.blocks for row in rows.found) else None,
            "lengths": "estimated" if estimated else "exact",
        }
