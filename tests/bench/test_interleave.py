"""Timing in turns, and the raw read beside it."""

from __future__ import annotations

import warnings

import pytest

from dovetail.bench import interleave


def test_bandwidth_is_in_gigabytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleave, "READ_MB", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = interleave.read_bandwidth(1)
    monkeypatch.setattr(interleave.cpu, "native", lambda: None)
    monkeypatch.setattr(interleave.machine, "read_bandwidth", lambda threads, size, seconds: 2e9 * threads)
    assert interleave.read_bandwidth(3) == 6.0
    assert 0.1 < first < 10_000


def test_more_rounds_go_on_in_turns_with_a_raw_read_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(interleave.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(interleave, "read_bandwidth", lambda threads: ran.append("read") or 10.0 * threads)
    timed = interleave.Interleaved([lambda: ran.append("a"), lambda: ran.append("b")], 2)
    assert ran == ["a", "b"]
    assert timed.until(2) == [[1.0, 1.0], [1.0, 1.0]] and timed.reads == [20.0, 20.0]
    # The first one after a raw read runs once more than it is timed.
    assert ran[2:] == ["read", "a", "a", "b", "read", "b", "b", "a"]
    assert timed.until(2) == [[1.0, 1.0], [1.0, 1.0]] and len(ran) == 10
    assert timed.ratios(0, 1, 3) == [1.0, 1.0, 1.0] and ran[10:] == ["read", "a", "a", "b"]
    assert [len(readings) for readings in timed.until(1)] == [1, 1]
