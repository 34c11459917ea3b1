from __future__ import annotations

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
    running: Running = start(ServiceOptions((NAME,), api_key="secret"))
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
