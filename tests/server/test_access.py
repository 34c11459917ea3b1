"""Who may ask, and how: keys, web pages, ids, content types, HEAD."""

from __future__ import annotations

import gzip
import json
import re
import subprocess

import httpx
import pytest

from dovetail.server.service import ServiceOptions
from tests.server.serving import NAME, Running

BODY = {"prompt": "x", "max_tokens": 1}
PAGE = "https://chat.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_any_of_the_keys_opens_under_either_header(start) -> None:
    running: Running = start(ServiceOptions((NAME,), api_keys=("first", "second")))
    for headers, status in (
        ({}, 401), ({"authorization": "Bearer third"}, 401), ({"authorization": "Basic first"}, 401),
        ({"x-api-key": "third"}, 401), ({"x-api-key": ""}, 401),
        ({"authorization": "Bearer first"}, 200), ({"authorization": "bearer second"}, 200),
        ({"x-api-key": "second"}, 200),
        ({"authorization": "Bearer third", "x-api-key": "first"}, 200),
    ):  # fmt: skip
        answer = httpx.post(f"{running.url}/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == status, headers


def test_no_web_page_may_call_by_default(shared: Running) -> None:
    asked = httpx.options(f"{shared.url}/v1/completions", headers={"origin": PAGE, **PREFLIGHT})
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers
    answer = httpx.get(f"{shared.url}/v1/models", headers={"origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("allowed", "shown"), [(PAGE, PAGE), ("*", "*")])
def test_an_allowed_page_is_told_so_before_it_sends_its_key(start, allowed: str, shown: str) -> None:
    running: Running = start(ServiceOptions((NAME,), api_keys=("key",), allowed_origins=(allowed,)))
    address, origin = f"{running.url}/v1/completions", {"origin": PAGE}
    asked = httpx.options(address, headers={**origin, **PREFLIGHT})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == shown
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert httpx.post(address, headers=origin, json=BODY).status_code == 401
    answer = httpx.post(address, headers={**origin, "authorization": "Bearer key"}, json=BODY)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == shown
    assert "access-control-allow-credentials" not in answer.headers
    if allowed != "*":
        other = httpx.options(address, headers={"origin": "https://evil.example", **PREFLIGHT})
        assert "access-control-allow-origin" not in other.headers


def test_a_request_s_id_is_echoed_and_else_made(shared: Running) -> None:
    for path, method in (("/health", "GET"), ("/v1/completions", "POST"), ("/nothing", "GET")):
        answer = httpx.request(method, shared.url + path, headers={"x-request-id": "mine-1"}, json=BODY)
        assert answer.headers["x-request-id"] == "mine-1"
    made = [httpx.get(f"{shared.url}/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch("[0-9a-f]{32}", name) for name in made)
    long = httpx.get(f"{shared.url}/health", headers={"x-request-id": "x" * 200})
    assert re.fullmatch("[0-9a-f]{32}", long.headers["x-request-id"])


def test_head(shared: Running) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/version", "/docs"):
        answer = httpx.head(shared.url + path)
        assert answer.status_code == 200 and not answer.content, path
    assert httpx.head(f"{shared.url}/nothing").status_code == 404


def test_curl_needs_no_content_type(shared: Running) -> None:
    command = ["curl", "-s", f"{shared.url}/v1/completions", "-d", json.dumps(BODY)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["usage"]["completion_tokens"] == 1
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a page may send without asking
        answer = httpx.post(
            f"{shared.url}/v1/completions",
            content=json.dumps(BODY),
            headers={"content-type": kind, "origin": PAGE},
        )
        assert answer.status_code == 415, kind


def test_the_page_of_the_api_is_complete_and_needs_nothing_else(shared: Running) -> None:
    page = httpx.get(f"{shared.url}/docs").text
    document = httpx.get(f"{shared.url}/openapi.json").json()
    assert all(path in page for path in document["paths"]) and "max_completion_tokens" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_compressed_bodies_are_refused_by_name(shared: Running) -> None:
    body, address = json.dumps(BODY).encode(), f"{shared.url}/v1/completions"
    plain = httpx.post(address, content=body, headers={"content-encoding": "identity"})
    assert plain.status_code == 200
    packed = httpx.post(address, content=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert packed.status_code == 415 and "gzip" in packed.json()["error"]["message"]
