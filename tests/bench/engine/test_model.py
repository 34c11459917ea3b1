"""`dovetail bench model` on a tiny model: what it says, what it leaves out, and when it fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dovetail.bench.engine import model, startup
from dovetail.core.errors import DovetailError
from dovetail.options import Options
from dovetail.setting import Setting
from tests.helpers.program import SMALL, call, start

KEYS = (
    "prefill_tokens_per_s", "decode_tokens_per_s", "streams_tokens_per_s", "latency_ms", "bytes_per_token",
    "read_bandwidth", "roofline_fraction", "startup_s", "peak_rss", "activity", "machine", "versions", "commit",
    "config",
)  # fmt: skip
SHORT = ("--quick", "--rounds", 2, "--max-model-len", 192)


def bench(model, *arguments, status=0):
    result = call("bench", "model", model, *SMALL, *SHORT, *arguments, "--json", "-")
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result


def kv_bytes(found):
    """Of a token of context."""
    return found["config"]["kv_memory"] / found["config"]["num_kv_pages"] / found["config"]["block_size"]


def written(found):
    """K and V of the step's own token, and a row of the embedding: 32 values of at most 4 bytes."""
    return kv_bytes(found) + 32 * 4


@pytest.fixture(scope="module")
def plain(tiny_model):
    """One plain run, that several tests look at."""
    return bench(tiny_model)


def test_the_result_has_the_keys_of_the_contract(plain):
    found, _ = plain
    assert [key for key in KEYS if key not in found] == []
    assert list(found["prefill_tokens_per_s"]) == ["128"]
    assert list(found["decode_tokens_per_s"]) == ["16"]
    assert list(found["streams_tokens_per_s"]) == ["8", "32"]
    assert list(found["latency_ms"]) == ["p50", "p90", "p99"]
    assert list(found["bytes_per_token"]) == list(found["roofline_fraction"]) == ["16"]
    assert found["startup_s"] > 0 and found["peak_rss"] > 1 << 20
    assert (found["rounds"], found["quick"], found["use"], found["activity"]) == (2, True, [], {})
    assert found["config"]["max_model_len"] == 192


def test_figures_lie_within_their_spread_and_fit_each_other(plain):
    found, _ = plain
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "roofline_fraction"):
        for size, value in found[key].items():
            low, high = found["spread"][key][size]
            assert 0 < low <= value <= high
    low, high = found["spread"]["read_bandwidth"]
    assert 0 < low <= found["read_bandwidth"] <= high
    assert "startup_s" not in found["spread"]  # one start
    latency = found["latency_ms"]
    assert latency["p50"] <= latency["p90"] <= latency["p99"]
    more = found["bytes_per_token"]["16"] - found["weight_bytes"] - (16 + 16 / 2) * kv_bytes(found)
    assert 0 < more <= written(found)


def test_latencies_are_of_the_tokens_of_all_rounds():
    side = object.__new__(model.Timed)
    side.samples, side.waits = {("latency_ms", "p99"): [2.0, 4.0], ("x",): [1.0]}, []
    assert side.figures() == {"latency_ms": {"p99": 3.0}, "x": 1.0}
    side.waits = [0.001] * 98 + [0.1] * 2
    latency = side.figures()["latency_ms"]
    assert (latency["p50"], latency["p90"], latency["p99"]) == pytest.approx((1, 1, 100))


def test_what_does_not_fit_is_named_with_its_reason(plain):
    found, result = plain
    skipped = {entry["figure"]: entry["why"] for entry in found["skipped"]}
    wanted = ["prefill_tokens_per_s 512", "prefill_tokens_per_s 2048"]
    wanted += ["decode_tokens_per_s 1024", "decode_tokens_per_s 4096"]
    assert list(skipped) == wanted
    assert skipped["decode_tokens_per_s 4096"] == "takes 4112 tokens of context, and max_model_len is 192"
    assert all(f"{figure} skipped: {why}" in result.stderr for figure, why in skipped.items())


def test_the_table_names_figures_and_units(plain):
    _, result = plain
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["figure", "unit", "median", "lowest", "highest"] in rows
    assert any(row[:4] == ["prompt", "of", "128", "tokens/s"] for row in rows)
    assert any(row[:2] == ["start-up", "s"] and row[-2:] == ["-", "-"] for row in rows)


def test_streams_that_cannot_run_together_are_left_out(tiny_model):
    options = ("--kernels", "torch", "--max-num-seqs", 8, "--max-num-batched-tokens", 24, "--rounds", 1)
    found, _ = bench(tiny_model, *options)
    skipped = {entry["figure"]: entry["why"] for entry in found["skipped"]}
    assert found["streams_tokens_per_s"] == {}
    assert "max_num_batched_tokens" in skipped["streams_tokens_per_s 8"]
    assert "max_num_seqs is 8" in skipped["streams_tokens_per_s 32"]
    assert found["weights"] == "expanded for the torch reference"


def test_two_settings_in_turns(tiny_model):
    found, result = bench(tiny_model, "--use", "ngram:tokens=8,min_n=1", "--against", "kv-cache-dtype=int8")
    assert found["use"] == ["ngram:tokens=8,min_n=1,max_n=4"] and found["activity"]["ngram"] > 0
    other = found["against"]
    assert (other["setting"], other["use"], other["activity"]) == ("kv-cache-dtype=int8", [], {})
    assert (found["config"]["kv_cache_dtype"], other["config"]["kv_cache_dtype"]) == ("float32", "int8")
    low, high = found["spread"]["ratio"]["decode_tokens_per_s"]["16"]
    assert low <= found["ratio"]["decode_tokens_per_s"]["16"] <= high
    ours, theirs = found["spread"]["decode_tokens_per_s"]["16"], other["spread"]["decode_tokens_per_s"]["16"]
    assert ours[0] / theirs[1] <= low and high <= ours[1] / theirs[0]
    assert {"startup_s", "peak_rss", "streams_tokens_per_s"} <= set(found["ratio"])
    assert "ratio" in result.stdout and "kv-cache-dtype=int8" in result.stdout
    # Several tokens share what a step reads where drafts are right.
    assert found["bytes_per_token"]["16"] < found["weight_bytes"] + (16 + 16 / 2) * kv_bytes(found)
    more = other["bytes_per_token"]["16"] - other["weight_bytes"] - (16 + 16 / 2) * kv_bytes(other)
    assert 0 < more <= written(other)


def test_a_technique_that_never_acts_is_an_error(tiny_model):
    found, result = bench(tiny_model, "--use", "sink-window:window=160", "--rounds", 1, status=1)
    assert found["activity"] == {"sink-window": 0}
    assert "sink-window was in use but never acted" in result.stderr
    assert "sink-window decides what is read" in result.stderr
    assert found["bytes_per_token"] == {} and found["decode_tokens_per_s"]["16"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--against", "speed=3"], "neither a technique nor an option"),
        (["--against", "ngram:tokens=0"], "tokens >= 1"),
        (["--against", "nothing"], "technique 'nothing' is unknown"),
        (["--against", "plain+"], "empty part"),
        (["--against", "block-size=8,16"], "must be one"),
        (["--rounds", "0"], "--rounds"),
        (["--use", "ngram:speed=1"], "no option of ngram"),
        (["--max-model-len", "9999"], "between 2 and the model's 4096"),
        (["--json", "no/where.json"], "there is no folder"),
    ],
)
def test_wrong_usage(tiny_model, arguments, says):
    result = call("bench", "model", tiny_model, *SMALL, "--quick", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_no_model(tmp_path):
    result = call("bench", "model", tmp_path / "nothing", "--quick")
    assert result.exit_code == 2
    assert "nothing" in result.stderr


def test_a_start_is_measured_in_a_process_that_may_fail(tiny_model, monkeypatch):
    monkeypatch.setattr(startup.sys, "executable", "/bin/false")
    with pytest.raises(DovetailError, match="ended with 1"):
        startup.start(str(tiny_model), Setting("plain", (), Options()))


def test_a_start_takes_the_options(tiny_model):
    found = startup.start(str(tiny_model), Setting("plain", (), Options(max_model_len=2, kv_memory=1 << 20)))
    assert found["startup_s"] > 0 and found["peak_rss"] > 1 << 20
    with pytest.raises(DovetailError, match="max_model_len"):
        startup.start(str(tiny_model), Setting("plain", (), Options(max_model_len=1)))


def test_ctrl_c_leaves_no_process(tiny_model):
    process = start("bench", "model", tiny_model, *SMALL, *SHORT)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (children := listed.read_text().split()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in errors and b"Traceback" not in errors
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
