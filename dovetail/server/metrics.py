"""What /metrics shows: vLLM's names, labels and buckets where the meaning is the same, and our own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dovetail.outputs import Delta

if TYPE_CHECKING:
    from dovetail.core.scheduler import SchedulerStats
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
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)
TOKENS: tuple[float, ...] = ()  # 1, 2, 5, 10, ... up to the context
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", TTFT),
    "inter_token_latency_seconds": ("Between steps that gave tokens.", INTER_TOKEN),
    "time_per_output_token_seconds": ("The same, under the name of older dashboards.", INTER_TOKEN),
    "request_time_per_output_token_seconds": ("Mean time of an answer's tokens after the first.", INTER_TOKEN),
    "e2e_request_latency_seconds": ("From arrival to the end.", LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", LATENCY),
    "request_inference_time_seconds": ("From the first step to the end.", LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", LATENCY),
    "request_decode_time_seconds": ("From the first token to the end.", LATENCY),
    "request_prompt_tokens": ("Prompt tokens of an answer.", TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", TOKENS),
    "request_max_num_generation_tokens": ("Tokens of the longest of a request's answers.", TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that were computed, not cached.", TOKENS),
    "request_params_n": ("How many answers requests ask for.", CHOICES),
    "request_params_max_tokens": ("How many tokens requests ask for at most.", TOKENS),
    "request_num_preemptions": ("How often an answer gave its pages back for others.", PREEMPTIONS),
    "iteration_tokens_total": ("Tokens in a step of the engine.", ITERATION),
}
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
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of those, tokens from the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._sources = self._labelled("prompt_tokens_by_source", "Prompt tokens by origin.", "source", SOURCES)
        self._success = self._labelled(
            "request_success", "Ended answers by reason.", "finished_reason", FINISH_REASONS
        )
        tokens = token_buckets(max_model_len)
        known = {name: tokens if buckets is TOKENS else buckets for name, (_, buckets) in HISTOGRAMS.items()}
        self._histograms = {
            name: Histogram(f"vllm:{name}", HISTOGRAMS[name][0], LABELS, buckets=buckets, registry=self.registry)
            .labels(*self.labels)
            for name, buckets in known.items()
        }  # fmt: skip
        self._unknown = Counter(
            "dovetail:unknown_request_fields", "Request fields that mean nothing here.", ("field",),
            registry=self.registry,
        )  # fmt: skip
        self._unknown_names: set[str] = set()

    def _counter(self, name: str, text: str) -> Any:
        return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*self.labels)

    def _labelled(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Any]:
        counter = Counter(f"vllm:{name}", text, (*LABELS, label), registry=self.registry)
        return {value: counter.labels(*self.labels, value) for value in values}

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def first_token(self, delta: Delta) -> None:
        prompt = len(delta.answer.prompt_token_ids)
        cached = max(0, delta.stream.request.cached_tokens)
        self._observe("time_to_first_token_seconds", delta.waited)
        self._prompt_tokens.inc(prompt)
        self._cached_tokens.inc(cached)
        self._sources["local_cache_hit"].inc(cached)
        self._sources["local_compute"].inc(prompt - cached)

    def next_token(self, seconds: float) -> None:
        self._observe("inter_token_latency_seconds", seconds)
        self._observe("time_per_output_token_seconds", seconds)

    def generated(self, tokens: int) -> None:
        self._generation_tokens.inc(tokens)

    def stepped(self, tokens: int) -> None:
        if tokens:
            self._observe("iteration_tokens_total", tokens)

    def finished(self, delta: Delta) -> None:
        """Count a choice that has ended, and its request if it was the last of its choices."""
        stream, answer, reason = delta.stream, delta.answer, delta.finish_reason
        request, prompt, tokens = stream.request, len(answer.prompt_token_ids), len(stream.token_ids)
        self._success[reason if reason in self._success else "error"].inc()
        self._observe("e2e_request_latency_seconds", delta.time - answer.arrival)
        self._observe("request_prompt_tokens", prompt)
        self._observe("request_generation_tokens", tokens)
        self._observe("request_num_preemptions", request.preemptions)
        if request.started is not None:
            self._observe("request_queue_time_seconds", request.started - answer.arrival)
            self._observe("request_inference_time_seconds", delta.time - request.started)
            if stream.first_token is not None:
                self._observe("request_prefill_time_seconds", stream.first_token - request.started)
                self._observe("request_decode_time_seconds", delta.time - stream.first_token)
                self._observe("request_prefill_kv_computed_tokens", prompt - max(0, request.cached_tokens))
        if stream.first_token is not None and tokens > 1:
            self._observe(
                "request_time_per_output_token_seconds", (delta.time - stream.first_token) / (tokens - 1)
            )
        if delta.last:
            limit = request.max_total - prompt
            self._observe("request_params_n", answer.params.n)
            self._observe("request_params_max_tokens", limit)
            self._observe("request_max_num_generation_tokens", max(len(s.token_ids) for s in answer.streams))

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
        stats, usage = scheduler.stats, self._usage()
        deferred = sum(r.fork_of is not None for r in list(scheduler.waiting))
        yield self._gauge("num_requests_running", "Requests in the batch.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        reasons = {"capacity": max(0, len(scheduler.waiting) - deferred), "deferred": deferred}
        yield self._gauges("num_requests_waiting_by_reason", "Why requests wait.", "reason", reasons)
        yield self._gauge("kv_cache_usage_perc", "Share of KV pages that running requests hold, 0 to 1.", usage)
        yield self._gauge("gpu_cache_usage_perc", "The same, under the name of older dashboards.", usage)
        yield self._cache_config()
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_tokens),
            ("num_preemptions", "Requests that gave their pages back for others.", stats.preemptions),
            ("spec_decode_num_drafts", "Guesses.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Guessed tokens.", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.accepted),
        ):
            yield self._count(f"vllm:{name}", text, value)
        yield from self._drafts(stats)
        for name, total in self.llm.slow_tier().items():
            yield self._count(f"dovetail:kv_offloading_{name}", f"{_SLOW_TIER[name]}.", total)
        for name, value in self.llm.activity().items():
            plain = name.replace("-", "_")
            yield self._count(f"dovetail:{plain}_activity", f"How often {name} acted.", value)
        for name, total in self.llm.counters().items():
            yield self._count(f"dovetail:{name.replace('-', '_')}", f"{name.replace('_', ' ')}.", total)

    def _drafts(self, stats: SchedulerStats) -> Iterator[CounterMetricFamily]:
        """What became of drafts, by position and by length. Empty where nothing drafts."""
        if stats.forced:
            yield self._count(
                "dovetail:drafts_forced_tokens", "Tokens that the form of answers forced.", stats.forced
            )
        if not sum(stats.lengths):
            return
        accepted = {str(i): n for i, n in enumerate(stats.accepted_at) if n or not i}
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Guessed tokens that were right, by position."
        yield self._counts(name, text, "position", accepted)
        lengths = {str(i): n for i, n in enumerate(stats.lengths) if n}
        yield self._counts("dovetail:drafts_chosen", "Steps of requests, by drafted tokens.", "length", lengths)
        yield self._count("dovetail:drafts_emitted_tokens", "Tokens of those steps.", stats.emitted)
        yield self._count("dovetail:drafts_failures", "Failures of the drafter.", stats.failures)

    def _cache_config(self) -> GaugeMetricFamily:
        config = self.llm.config
        values = {
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "engine": self.labels[1],
            "num_cpu_blocks": self.llm.engine.pool.num_pages,
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "How KV is kept.", labels=tuple(values))
        family.add_metric([str(value) for value in values.values()], 1)
        return family

    def _gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=(*LABELS, label))
        for key, value in values.items():
            family.add_metric((*self.labels, key), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _count(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _counts(self, name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=(*LABELS, label))
        for key, value in values.items():
            family.add_metric((*self.labels, key), value)
        return family

    def _usage(self) -> float:
        held = [r.table.pages.copy() for r in list(self.llm.engine.scheduler.running)]
        return len(np.unique(np.concatenate(held))) / self.llm.engine.pool.num_pages if held else 0.0
