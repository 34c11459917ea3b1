"""Every sampling option: its default, its range, and the name of the field in the refusal."""

from __future__ import annotations

import dataclasses
import math
from collections import UserDict
from typing import Any

import numpy as np
import pytest

from dovetail.core.errors import RequestError
from dovetail.core.sampling import MAX_LOGIT_BIAS, SamplingParams

DEFAULTS = {  # vLLM's
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": (), "ignore_eos": False,
    "max_tokens": 16, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "skip_special_tokens": True,
    "include_stop_str_in_output": False, "logit_bias": {}, "structured_outputs": None, "shown_token_ids": (),
    "stops": (),
}  # fmt: skip
TINY = 5e-324
RANGES = {  # the least and the largest that are taken, and the nearest on both sides that are not
    "presence_penalty": (-2, 2, math.nextafter(-2, -3), math.nextafter(2, 3)),
    "frequency_penalty": (-2, 2, math.nextafter(-2, -3), math.nextafter(2, 3)),
    "repetition_penalty": (TINY, 100, 0, math.nextafter(100, 101)),
    "temperature": (0, 100, -TINY, math.nextafter(100, 101)),
    "top_p": (TINY, 1, 0, math.nextafter(1, 2)),
    "min_p": (0, 1, -TINY, math.nextafter(1, 2)),
    "n": (1, 128, 0, 129),
    "top_k": (-1, 2**31 - 1, -2, 2**31),
    "seed": (-(2**63), 2**64 - 1, -(2**63) - 1, 2**64),
    "max_tokens": (1, 2**31 - 1, 0, 2**31),
    "min_tokens": (0, 2**31 - 1, -1, 2**31),
    "logprobs": (0, 20, -1, 21),
    "prompt_logprobs": (0, 20, -1, 21),
}
FLOATS = list(RANGES)[:6]
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


def refused(field: str, value: object, words: str = "", **more: Any) -> None:
    with pytest.raises(RequestError, match=words) as info:
        SamplingParams(**{field: value, **more})  # type: ignore[arg-type]
    assert info.value.param == field
    assert (info.value.status, info.value.type) == (400, "invalid_request_error")


def test_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize("field", RANGES)
def test_the_ends_of_a_range_are_taken_and_what_lies_outside_is_refused(field: str) -> None:
    least, most, below, above = RANGES[field]
    free: dict[str, Any] = {"max_tokens": None} if field == "min_tokens" else {}
    for value in (least, most):
        assert getattr(SamplingParams(**{field: value, **free}), field) == value
    refused(field, below, f"{field} must be", **free)
    refused(field, above, f"{field} must be between .* and .*, got", **free)


@pytest.mark.parametrize("field", RANGES)
def test_what_is_no_number_is_refused(field: str) -> None:
    for value in (True, "1", [1], 1j, *([1.5, 1.0] if field not in FLOATS else [math.nan, math.inf])):
        refused(field, value, f"{field} must be")
    if field in OPTIONAL:
        assert getattr(SamplingParams(**{field: None}), field) is None
    else:
        refused(field, None, f"{field} must be")


def test_the_least_number_of_tokens_is_not_above_the_largest() -> None:
    assert SamplingParams(min_tokens=7, max_tokens=7).min_tokens == 7
    refused("min_tokens", 8, r"min_tokens \(8\) is above max_tokens \(7\)", max_tokens=7)


def test_greedy_and_penalised() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=TINY).greedy
    assert not SamplingParams(temperature=0).penalised
    for change in ({"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}):
        assert SamplingParams(**change).penalised  # type: ignore[arg-type]


def test_what_ends_an_answer_is_bounded() -> None:
    refused("stop", [str(i) for i in range(1025)], "stop may have 1024 strings, got 1025")
    refused("stop", ["a", "b" * 1025], "a stop may have 1024 characters, got 1025")
    refused("stop_token_ids", list(range(1025)), "stop_token_ids may have 1024 ids, got 1025")
    assert SamplingParams(stop_token_ids=[3, 1, 3] * 1000).stop_token_ids == (3, 1)


def test_stop_strings() -> None:
    assert SamplingParams(stop="ab").stops == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stops == ("ab", "c")
    assert SamplingParams(stop=[]).stops == ()
    for value in ("", ["ab", ""], [1], [None]):
        refused("stop", value, "stop must be non-empty strings, got")
    for value in (3, b"ab", {"ab": 1}):
        refused("stop", value, "stop must be a list, got")
    with pytest.raises(TypeError, match="stops"):
        SamplingParams(stops=("ab",))  # type: ignore[call-arg]


def test_stop_token_ids() -> None:
    assert SamplingParams(stop_token_ids=[0, 5]).stop_token_ids == (0, 5)
    for value in ([-1], [True], ["1"], [1.0]):
        refused("stop_token_ids", value, "stop_token_ids must be token ids, got")
    for value in (3, "ab", {1: 2}):
        refused("stop_token_ids", value, "stop_token_ids must be a list, got")


def test_logit_bias() -> None:
    found = SamplingParams(logit_bias=UserDict({"5": 1, 0: -100, np.int64(7): 100})).logit_bias
    assert found == {5: 1.0, 0: -100.0, 7: 100.0}
    assert all(type(k) is int and type(v) is float for k, v in (found or {}).items())
    full = dict.fromkeys(range(MAX_LOGIT_BIAS), 0.0)
    assert SamplingParams(logit_bias=full).logit_bias == full
    refused("logit_bias", full | {-1: 0.0}, "logit_bias may have 1024 entries, got 1025")
    for value in ([], 5, "x"):
        refused("logit_bias", value, "logit_bias must map token ids to numbers, got")
    for key in ("x", 1.0, None, ""):
        refused("logit_bias", {key: 1}, "logit_bias keys must be token ids, got")
    for bias in (math.nextafter(100, 101), math.nextafter(-100, -101), math.nan, True, "1", None):
        refused("logit_bias", {5: bias}, "logit_bias must be")
    refused("logit_bias", {-1: 1}, "names token -1 twice or below 0")
    refused("logit_bias", {"5": 1, 5: 1}, "names token 5 twice or below 0")
