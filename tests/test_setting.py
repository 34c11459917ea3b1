"""Settings and sweeps in one line."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.options import Options
from dovetail.setting import Setting, parse_setting, parse_sweep

BASE = Setting("base", ("ngram",), Options(threads=1))


def test_a_setting_adds_to_its_base():
    found = parse_setting("sink-window:sink=4,window=64+kv-cache-dtype=int8+max_num_seqs=3", BASE)
    assert found.use == ("ngram", "sink-window:sink=4,window=64")
    assert found.options == Options(threads=1, kv_cache_dtype="int8", max_num_seqs=3)
    assert parse_setting("kv-memory=2MiB+enable-prefix-caching=false", BASE).options == Options(
        threads=1, kv_memory=2 << 20, enable_prefix_caching=False
    )
    assert parse_setting("kv-offloading-size=3GiB+emulate-link=2.5", BASE).options == Options(
        threads=1, kv_offloading_size=3 << 30, emulate_link=2.5
    )


def test_plain_and_exact_are_words():
    assert parse_setting("plain", BASE) == Setting("plain", BASE.use, BASE.options)
    exact = parse_setting("exact+threads=2", BASE).options
    assert (exact.dtype, exact.activations, exact.kv_cache_dtype, exact.threads) == (
        "float32",
        "exact",
        "float32",
        2,
    )


def test_a_sweep_is_all_combinations_in_the_order_written():
    found = parse_sweep("sink-window:sink=0,4,window=64..256+kv-cache-dtype=bf16,int8", Setting("", ()))
    wanted = [
        f"sink-window:sink={s},window={w}+kv-cache-dtype={k}"
        for s, w, k in itertools.product((0, 4), (64, 128, 256), ("bf16", "int8"))
    ]
    assert [s.name for s in found] == wanted
    assert [s.use[0] for s in found[::2]] == [
        f"sink-window:sink={s},window={w}" for s in (0, 4) for w in (64, 128, 256)
    ]


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_range_doubles_from_its_start_and_ends_within_its_end(low: int, more: int):
    values = [s.options.max_num_seqs for s in parse_sweep(f"max-num-seqs={low}..{low + more}", BASE)]
    assert values[0] == low and values[-1] <= low + more < 2 * values[-1]
    assert all(b == 2 * a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty part"),
        ("ngram+", "empty part"),
        ("budget=3", "neither a technique nor an option"),
        ("kv-cache-dtype=int8,kv-cache-dtype=int4", "given twice"),
        ("ngram:tokens", "not key=value"),
        ("ngram:tokens=4..2", "not a range"),
        ("ngram:tokens=0..2", "not a range"),
        ("ngram:tokens=a..b", "not a range"),
        ("threads=many", "no value"),
        ("enable-prefix-caching=yes", "no value"),
        ("kv-memory=much", "not a size"),
        ("max-num-seqs=1,2,3,4,5,6,7,8,9,10,11+threads=" + ",".join(map(str, range(1, 101))), "at most 1024"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, why: str):
    with pytest.raises(ConfigError, match=why):
        parse_sweep(text, BASE)


def test_one_setting_is_asked_for_where_one_is_needed():
    with pytest.raises(ConfigError, match="stands for 2 settings"):
        parse_setting("threads=1,2", BASE)
