"""What techniques refuse, by name and with what to change, when an `LLM` is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM, CapacityError, ConfigError, models
from dovetail.ops.cpu import isas
from dovetail.techniques import MODULES, technique
from tests.tiny import NEEDED, TinyCheckpoint, tiny_config, tiny_engine

SLOW: dict[str, Any] = {
    "kv_memory": "16MiB", "kv_offloading_size": "1MiB", "kv_offloading_backend": "host", "max_model_len": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("quest:budget=47,skip_layers=0", r"quest: a budget of 47 tokens .* page of 16 .* give at least 48"),
        ("quest:budget=64,skip_layers=0,score=bound,chunk=5", r"quest: chunk=5 .* block size, 16; use a divisor"),
        ("quest:budget=64,skip_layers=0,page=32", r"quest: page=32 must be .* 16; use --block-size 32"),
        ("quest:budget=64", r"quest: skip_layers=2 skips all of the model's 2 layers"),
        ("shadowkv:rank=17,budget=256,outliers=2", r"shadowkv: rank=17 .* all 2 KV heads together, 16; give"),
        ("shadowkv:rank=4,budget=256,chunk=3", r"shadowkv: chunk=3 does not divide .* 16; use a divisor"),
        ("shadowkv:rank=4,budget=64,outliers=2", r"shadowkv: a budget of 64 .* give at least 80, or fewer"),
        ("infinigen:budget=47,skip_layers=1", r"infinigen: a budget of 47 tokens .* give at least 48"),
        ("infinigen:skip_layers=1,eviction=lru", r"infinigen: eviction=lru .* without a pool; give pool=TOKENS"),
        ("infinigen:skip_layers=1,eviction=fifo", r"infinigen: eviction=fifo .* without a pool; give pool=TOKENS"),
        ("infinigen:skip_layers=2", r"infinigen: skip_layers=2 skips all of the model's 2 layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_at_start(tiny_model: Path, spec: str, words: str) -> None:
    if not isas():
        pytest.skip("a slow tier needs the native library")
    with pytest.raises(ConfigError, match=words):
        LLM(tiny_model, use=spec, **SLOW)


@pytest.mark.parametrize(
    ("spec", "memory", "words"),
    [
        # Of 2 layers and 2 KV heads of 8: a float32 page takes 8192 bytes. Codes are 3 vectors of 16, landmarks
        # 2 of 32, coefficients 16 of 4, marks two bytes, angles 2 of 16 over all layers; a request's basis 4 of 16
        # and, packed, 4 of 32. Partial keys: 16 of 4.
        ("quest:budget=64,skip_layers=0", 8192 + 768, "8192 bytes, and what quest keeps beside KV 768 bytes"),
        (
            "shadowkv:rank=4,budget=256,outliers=2", 36 * 4096 + 32 * (1024 + 512 + 2 * 4 + 128) + 512 + 1024,
            "147456 bytes, and what shadowkv keeps beside KV 55040 bytes",
        ),
        (
            "infinigen:skip_layers=1", 36 * 4096 + 32 * 1024,
            "147456 bytes, and what infinigen keeps beside KV 32768 bytes",
        ),
    ],
)  # fmt: skip
def test_memory_that_what_a_technique_keeps_does_not_fit_in_is_refused(
    tiny_model: Path, spec: str, memory: int, words: str
) -> None:
    if not isas():
        pytest.skip("native kernels and a slow tier need the native library")
    options: dict[str, Any] = dict(dtype="float32", max_num_seqs=1)
    if not spec.startswith("quest"):  # 32 pages, and 2 that a step writes
        options |= dict(SLOW, kv_offloading_size="256KiB", max_num_batched_tokens=16)
    with pytest.raises(CapacityError, match=f"{words}; raise --kv-memory"):
        LLM(tiny_model, use=spec, **dict(options, kv_memory=memory - 1))
    LLM(tiny_model, use=spec, **dict(options, kv_memory=memory))


@pytest.mark.parametrize("spec", ["shadowkv:rank=4,budget=256,outliers=2", "infinigen:skip_layers=1"])
def test_what_a_model_or_an_engine_does_not_have_is_named(
    tiny_model: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = spec.partition(":")[0]
    with pytest.raises(ConfigError, match=f"{name} needs a slow tier, which nothing here provides"):
        LLM(tiny_model, use=spec)
    known = models.facts
    monkeypatch.setattr(models, "facts", lambda config: known(config) - {"rotary positions"})
    with pytest.raises(ConfigError, match=f"{name} needs rotary positions, which nothing here provides"):
        LLM(tiny_model, use=spec, **SLOW)


@pytest.mark.parametrize(
    ("spec", "windows", "words"),
    [
        ("quest:budget=16,skip_layers=1", (None, 8, 8), "every layer from 1 on .*; lower skip_layers"),
        ("infinigen:budget=16,skip_layers=1", (None, 8, 8), "every layer from 1 on .*; lower skip_layers"),
        ("quest:budget=16,skip_layers=0", (8, 8, 8), "every layer from 0 on .*; leave quest out"),
        (
            "shadowkv:rank=4,budget=24,chunk=2,outliers=2",
            (8, 8, 8),
            "every layer from 0 .*; leave shadowkv out",
        ),
        ("sink-window:window=8", (8, 8, 8), "every layer from 0 on .*; leave sink-window out"),
    ],
)
def test_a_model_that_leaves_nothing_to_choose_is_refused(
    spec: str, windows: tuple[int | None, ...], words: str
) -> None:
    name = spec.partition(":")[0]
    checkpoint = TinyCheckpoint(tiny_config(num_layers=3, sliding_windows=windows))
    with pytest.raises(ConfigError, match=f"{name}: {words}"):
        tiny_engine(spec, checkpoint=checkpoint)
    tiny_engine(spec, checkpoint=TinyCheckpoint(tiny_config(num_layers=3, sliding_windows=(8, 8, None))))


def test_those_that_rotate_keys_or_queries_say_so() -> None:
    """A model without rotary positions could not be refused otherwise."""
    needy = {name for name in MODULES if "rotary positions" in technique(NEEDED.get(name, name)).needs}
    assert needy == {"infinigen", "shadowkv"}
