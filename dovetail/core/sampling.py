"""How the tokens of a request are chosen. Field names and defaults are vLLM's."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs

MAX_LOGPROBS = 20  # larger reveals the output projection and costs memory per token
MAX_LOGIT_BIAS = 1024
MAX_STOPS = 1024  # looked for in every step, for every answer
MAX_STOP = 1024  # characters of a stop
MAX_N = 128


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; every value is checked when it is built.

    Raises RequestError naming the field for NaN, out-of-range or wrongly typed values.
    `max_tokens=None` means: up to the end of the context. structured_outputs: the form of the answer, as
    StructuredOutputs or a mapping of its fields.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    seed: int | None = None  # -1 is None, as for other engines
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_token_ids: Sequence[int] = ()  # special tokens that are part of the text all the same
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputs | None = None
    stops: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        for name, low, high in _FLOAT_RANGES:
            _check_float(name, getattr(self, name), low, high)
        for name, low, high, optional in _INT_RANGES:
            _check_int(name, getattr(self, name), (low, high), optional)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty must be above 0, got 0", param="repetition_penalty")
        if self.top_p == 0:
            raise RequestError("top_p must be above 0 and at most 1, got 0", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})", param="min_tokens"
            )
        object.__setattr__(self, "stops", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "shown_token_ids", _token_ids("shown_token_ids", self.shown_token_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", StructuredOutputs.parse(self.structured_outputs))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


_FLOAT_RANGES = (
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 100.0),
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
)
_INT_RANGES = (
    ("n", 1, MAX_N, False),
    ("top_k", -1, 2**31 - 1, False),
    ("seed", -(2**63), 2**64 - 1, True),
    ("max_tokens", 1, 2**31 - 1, True),
    ("min_tokens", 0, 2**31 - 1, False),
    ("logprobs", 0, MAX_LOGPROBS, True),
    ("prompt_logprobs", 0, MAX_LOGPROBS, True),
)


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number, got {value!r}", param=name)
    if value != value or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value!r}", param=name)


def _check_int(name: str, value: object, bounds: tuple[int, int], optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, got {value!r}", param=name)
    if not bounds[0] <= value <= bounds[1]:
        raise RequestError(f"{name} must be between {bounds[0]} and {bounds[1]}, got {value}", param=name)


def _items(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list, got {values!r}", param=name)
    return tuple(values)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else _items("stop", stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop may have {MAX_STOPS} strings, got {len(stops)}", param="stop")
    for s in stops:
        if not isinstance(s, str) or not s:
            raise RequestError(f"stop must be non-empty strings, got {s!r}", param="stop")
        if len(s) > MAX_STOP:
            raise RequestError(f"a stop may have {MAX_STOP} characters, got {len(s)}", param="stop")
    return stops


def _token_ids(name: str, ids: Sequence[int] | None) -> tuple[int, ...]:
    ids = () if ids is None else _items(name, ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise RequestError(f"{name} must be token ids, got {i!r}", param=name)
    found = tuple(dict.fromkeys(ids))
    if len(found) > MAX_STOPS:
        raise RequestError(f"{name} may have {MAX_STOPS} ids, got {len(found)}", param=name)
    return found


def _bias(bias: Mapping[int, float] | None) -> dict[int, float]:
    if bias is not None and not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r}", param="logit_bias")
    if bias and len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias may have {MAX_LOGIT_BIAS} entries, got {len(bias)}", param="logit_bias")
    out: dict[int, float] = {}
    for key, value in (bias or {}).items():
        try:
            token = int(key) if isinstance(key, str) else operator.index(key)
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias keys must be token ids, got {key!r}", param="logit_bias") from None
        _check_float("logit_bias", value, -100.0, 100.0)
        if token < 0 or token in out:
            raise RequestError(f"logit_bias names token {key!r} twice or below 0", param="logit_bias")
        out[token] = float(value)
    return out
