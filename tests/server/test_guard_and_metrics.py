from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dovetail.server.metrics import token_buckets
from dovetail.server.service import ServiceOptions
from tests.server.serving import NAME, Running
from tests.test_clock import VIRTUAL

PREFIX = "vllm:"
LABELLED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    "prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "num_preemptions",
    "request_success", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
)  # fmt: skip
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
)  # fmt: skip


def test_every_route_but_health_needs_the_key(start) -> None:
    running: Running = start(ServiceOptions((NAME,), api_keys=("other", "secret")))
    paths = [*running.server.config.app.openapi()["paths"], "/docs", "/openapi.json", "/nowhere", "//health"]
    for path in paths:
        for method in ("GET", "POST"):
            for name, value in (("x", ""), ("authorization", "Bearer wrong"), ("authorization", "secret")):
                answer = httpx.request(method, running.url + path, headers={name: value})
                if path != "/health":
                    assert answer.status_code == 401, (path, method)
                    assert answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{running.url}/health").status_code == 200
    key = {"authorization": "Bearer secret"}
    assert httpx.get(f"{running.url}/v1/models", headers=key).status_code == 200
    answer = httpx.post(f"{running.url}/v1/completions", headers=key, json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200


def test_metrics_have_vllm_s_names_and_count(start) -> None:
    running: Running = start(use=["ngram:tokens=2"])
    running.complete("one two one two one two", max_tokens=8, ignore_eos=True, logit_bias={"65": 100}, strange=1)
    running.complete("one two one two one two", max_tokens=8, ignore_eos=True)
    text = httpx.get(f"{running.url}/metrics").text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    for name in LABELLED + COUNTERS:
        sample = families[PREFIX + name].samples[0]
        assert sample.labels["model_name"] == NAME and sample.labels["engine"] == "0"
    values = {s.name: s.value for f in families.values() for s in f.samples if not s.labels.get("le")}
    assert values["vllm:generation_tokens_total"] == 16
    assert values["vllm:prompt_tokens_total"] == 46
    assert values["vllm:prefix_cache_hits_total"] > 0
    drafted, accepted = (values[f"vllm:spec_decode_num_{k}_tokens_total"] for k in ("draft", "accepted"))
    assert 0 < accepted <= drafted
    assert values["dovetail:ngram_activity_total"] > 0
    assert values["dovetail:unknown_request_fields_total"] == 1
    for name in HISTOGRAMS:
        assert families[PREFIX + name].type == "histogram" and values[f"{PREFIX}{name}_count"] > 0, name
    reasons = {s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples}
    assert reasons == {"stop": 0, "length": 2, "abort": 0, "error": 0}


def test_what_became_of_drafts_is_counted_by_position_and_length(start) -> None:
    running: Running = start(use=["smartspec:drafter=ngram,tokens=3,fixed=3,min_n=1"])
    running.complete("one two one two one two", max_tokens=40, ignore_eos=True, logit_bias={"65": 100})
    text = httpx.get(f"{running.url}/metrics").text
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]

    def by(name: str, label: str) -> dict[int, float]:
        return {int(s.labels[label]): s.value for s in samples if s.name == name}

    values = {s.name: s.value for s in samples}
    accepted = by("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position")
    assert accepted[0] > 10 and list(accepted.values()) == sorted(accepted.values(), reverse=True)
    assert sum(accepted.values()) == values["vllm:spec_decode_num_accepted_tokens_total"]
    chosen = by("dovetail:drafts_chosen_total", "length")
    drafted = sum(length * n for length, n in chosen.items())
    assert max(chosen) <= 3 and drafted == values["vllm:spec_decode_num_draft_tokens_total"]
    assert values["dovetail:drafts_emitted_tokens_total"] == sum(chosen.values()) + sum(accepted.values())
    assert values["dovetail:smartspec_predicted_seconds_total"] > 0
    assert values["dovetail:smartspec_measured_seconds_total"] > 0


MODEL = '{model_name="$model_name"}'
RATE = f"{MODEL}[$__rate_interval]"
QUANTILES = (
    "e2e_request_latency_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
    "time_to_first_token_seconds",
)  # fmt: skip
# The queries of vLLM's official dashboard (examples/.../grafana.json), of its earlier and its present form.
DASHBOARD = [
    *(f"histogram_quantile({q}, sum by(le) (rate(vllm:{name}_bucket{RATE})))"
      for name in QUANTILES for q in (0.99, 0.95, 0.9, 0.5)),
    *(f"rate(vllm:{name}_sum{RATE})\n/\nrate(vllm:{name}_count{RATE})" for name in QUANTILES),
    f"rate(vllm:prompt_tokens_total{RATE})",
    f"rate(vllm:generation_tokens_total{RATE})",
    f"vllm:num_requests_running{MODEL}",
    f"vllm:num_requests_waiting{MODEL}",
    f"vllm:kv_cache_usage_perc{MODEL}",
    f"vllm:gpu_cache_usage_perc{MODEL}",
    f"sum by(le) (increase(vllm:request_prompt_tokens_bucket{RATE}))",
    f"sum by(le) (increase(vllm:request_generation_tokens_bucket{RATE}))",
    f"sum by(finished_reason) (increase(vllm:request_success_total{RATE}))",
    f"rate(vllm:request_queue_time_seconds_sum{RATE})",
    f"rate(vllm:request_prefill_time_seconds_sum{RATE})",
    f"rate(vllm:request_decode_time_seconds_sum{RATE})",
    f"rate(vllm:request_max_num_generation_tokens_sum{RATE})",
]  # fmt: skip
# Of vLLM's other two dashboards, the names; their queries have the same forms.
STATISTICS = (
    "vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
)  # fmt: skip
SELECTOR = re.compile(r'(vllm:\w+)(?:\{model_name="\$model_name"\})')


def test_every_query_of_the_official_dashboard_has_data(start) -> None:
    running: Running = start(max_num_seqs=1)
    running.complete(["one two three", "four"], max_tokens=8, ignore_eos=True, n=2)
    families = list(text_string_to_metric_families(httpx.get(f"{running.url}/metrics").text))
    known: dict[str, list] = {}
    for sample in (s for f in families for s in f.samples if s.labels.get("model_name") == NAME):
        known.setdefault(sample.name, []).append(sample)
    for query in DASHBOARD:
        names = SELECTOR.findall(query)
        assert names, query
        for name in names:
            assert known.get(name), query
            if name.endswith(("_total", "_sum", "_count")):  # they have counted; gauges may be 0
                assert sum(s.value for s in known[name]) > 0, query
            if "by(le)" in query:
                assert [s.labels["le"] for s in known[name]][-1] == "+Inf" and known[name][-1].value > 0, query
            if "by(finished_reason)" in query:
                assert {s.labels["finished_reason"] for s in known[name]} >= {"stop", "length", "abort"}
    assert all(known[name] for name in STATISTICS)


def test_times_of_a_request_add_up(start) -> None:
    """Two requests of three tokens, one after the other, on an engine whose steps take a second each."""
    running: Running = start(use=VIRTUAL, max_num_seqs=1)
    running.complete(["a", "b"], max_tokens=3, ignore_eos=True)
    text = httpx.get(f"{running.url}/metrics").text
    values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    for name, count, total in (
        ("request_queue_time_seconds", 2, 3), ("request_prefill_time_seconds", 2, 2),
        ("request_decode_time_seconds", 2, 4), ("request_inference_time_seconds", 2, 6),
        ("e2e_request_latency_seconds", 2, 9), ("request_time_per_output_token_seconds", 2, 2),
        ("request_max_num_generation_tokens", 2, 6), ("request_params_max_tokens", 2, 6),
        ("request_params_n", 2, 2), ("request_prefill_kv_computed_tokens", 2, 2),
        ("request_num_preemptions", 2, 0),
    ):  # fmt: skip
        assert (values[f"vllm:{name}_count"], values[f"vllm:{name}_sum"]) == (count, total), name


def test_unknown_fields_cannot_fill_the_registry(shared: Running) -> None:
    for at in range(0, 200, 50):
        shared.complete("x", max_tokens=1, **{f"made_up_{at + i}": 1 for i in range(50)})
    names = httpx.get(f"{shared.url}/metrics").text.count("dovetail:unknown_request_fields_total{")
    assert names <= 65


def test_token_buckets() -> None:
    assert token_buckets(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert token_buckets(1) == (1,)


@pytest.mark.parametrize("path", ["/version", "/health", "/openapi.json"])
def test_information(shared: Running, path: str) -> None:
    assert httpx.get(shared.url + path).status_code == 200


def test_the_version_has_the_resolved_configuration(shared: Running) -> None:
    found = httpx.get(f"{shared.url}/version").json()
    config = shared.llm.config
    assert found["config"]["use"] == list(config.use) and found["config"]["threads"] == config.threads
    assert found["config"]["kv_memory"] == config.kv_memory


def test_latencies_are_the_session_s_clock_s(start) -> None:
    """A client asks for three tokens of an engine whose steps take a second each."""
    running: Running = start(use=VIRTUAL)
    for prompt in ("a", ["b", "c"]):
        running.complete(prompt, max_tokens=3, ignore_eos=True)
    text = httpx.get(f"{running.url}/metrics").text
    values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    for name, count, total in (
        ("time_to_first_token_seconds", 3, 3.0),
        ("inter_token_latency_seconds", 6, 6.0),
        ("e2e_request_latency_seconds", 3, 9.0),
    ):
        assert (values[f"vllm:{name}_count"], values[f"vllm:{name}_sum"]) == (count, total), name
