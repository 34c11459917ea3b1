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
