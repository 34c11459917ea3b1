"""What /metrics shows: vLLM's names, labels and buckets where the meaning is the same, and our own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from dovetail.llm import LLM

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error")
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION = (1, 8, *(2**i for i in range(4, 15)))
_SLOW_TIER = {
    "hits": "Pages of a KV head that were on the device when they were wanted",
    "misses": "Pages of a KV head that came from the slow tier",
    "evictions": "Pages of a KV head that left the device",
    "failures": "Transfers that failed",
    "bytes_in": "Bytes of KV read from the slow tier",
    "bytes_out": "Bytes of KV written to the slow tier",
    "stall_seconds": "Time that steps waited for the slow tier",
}
MAX_UNKNOWN = 64  # unknown fields that are counted by name; clients choose these names


def token_buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to `limit`."""
    series = (m * 10**e for e in range(len(str(limit))) for m in (1, 2, 5))
    return tuple(b for b in series if b <= limit)


class Metrics:
    """Counters and histograms of requests. Its methods may be called from any thread."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.labels = (model_name, "0")
        tokens = token_buckets(max_model_len)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "Between steps that gave tokens.", INTER_TOKEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", LATENCY)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_generation = self._histogram("request_generation_tokens", "Tokens of an answer.", tokens)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens in a step of the engine.", ITERATION)
        success = Counter(
            "vllm:request_success",
            "Ended answers by reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._success = {r: success.labels(*self.labels, r) for r in FINISH_REASONS}
        self._unknown = Counter(
            "dovetail:unknown_request_fields", "Request fields that mean nothing here.", ("field",),
            registry=self.registry,
        )  # fmt: skip
        self._unknown_names: set[str] = set()

    def _counter(self, name: str, text: str) -> Any:
        return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*self.labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry).labels(
            *self.labels
        )

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self._ttft.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def next_token(self, seconds: float) -> None:
        self._itl.observe(seconds)

    def generated(self, tokens: int) -> None:
        self._generation_tokens.inc(tokens)

    def stepped(self, tokens: int) -> None:
        if tokens:
            self._iteration.observe(tokens)

    def finished(self, reason: str, prompt_tokens: int, tokens: int, seconds: float) -> None:
        self._success[reason if reason in self._success else "error"].inc()
        self._e2e.observe(seconds)
        self._request_prompt.observe(prompt_tokens)
        self._request_generation.observe(tokens)

    def unknown_field(self, name: str) -> bool:
        """Count an unknown field. True if it is the first of its name."""
        new = name not in self._unknown_names
        if new and len(self._unknown_names) >= MAX_UNKNOWN:
            name, new = "(other)", False
        self._unknown_names.add(name)
        self._unknown.labels(name).inc()
        return new

    def watch(self, llm: LLM) -> None:
        """Add what the engine itself counts. It is read when /metrics is requested."""
        self.registry.register(_EngineNumbers(llm, self.labels))

    def text(self) -> bytes:
        out: bytes = generate_latest(self.registry)
        return out


class _EngineNumbers:
    """The scheduler's and the techniques' own counts. Reading them from another thread may be one step off."""

    def __init__(self, llm: LLM, labels: tuple[str, ...]) -> None:
        self.llm = llm
        self.labels = labels

    def collect(self) -> Iterator[Any]:
        scheduler = self.llm.engine.scheduler
        stats = scheduler.stats
        yield self._gauge("num_requests_running", "Requests in the batch.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        yield self._gauge("kv_cache_usage_perc", "Share of KV pages that running requests hold.", self._usage())
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_tokens),
            ("num_preemptions", "Requests that gave their pages back for others.", stats.preemptions),
            ("spec_decode_num_draft_tokens", "Guessed tokens.", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.accepted),
        ):
            yield self._count(f"vllm:{name}", text, value)
        for name, total in self.llm.slow_tier().items():
            yield self._count(f"dovetail:kv_offloading_{name}", f"{_SLOW_TIER[name]}.", total)
        for name, value in self.llm.activity().items():
            plain = name.replace("-", "_")
            yield self._count(f"dovetail:{plain}_activity", f"How often {name} acted.", value)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _count(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _usage(self) -> float:
        held = [r.table.pages.copy() for r in list(self.llm.engine.scheduler.running)]
        return len(np.unique(np.concatenate(held))) / self.llm.engine.pool.num_pages if held else 0.0
