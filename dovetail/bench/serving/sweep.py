"""Which rates are tried: a given list, or a search up to saturation."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

from dovetail.core.errors import ConfigError

AUTO = "auto"
MAX_DOUBLINGS = 16
BISECTIONS = 2

_FORM = "write requests per second as 2, a list as 1,2,4, doubling as 1..32, max for all at once, or auto"

# Runs a load at a rate. Returns for each target whether it was saturated.
Try = Callable[[float], Awaitable[Sequence[bool]]]


def parse_rates(text: str) -> list[float]:
    """Rates in requests per second; infinity is `max`. Raises ConfigError."""
    rates: list[float] = []
    for part in text.split(","):
        low, dots, high = (word.strip() for word in part.partition(".."))
        first = _rate(low, text)
        last = _rate(high, text) if dots else first
        if last < first or (dots and math.isinf(last)):
            raise ConfigError(f"--rate {text}: {part} is no range; {_FORM}")
        while first <= last:
            rates.append(first)
            if math.isinf(first):
                break
            first *= 2
    if len(set(rates)) < len(rates):
        raise ConfigError(f"--rate {text}: names a rate twice")
    return rates


def _rate(text: str, whole: str) -> float:
    if text == "max":
        return math.inf
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"--rate {whole}: {_FORM}")
    return rate


def first_rate(seconds: float) -> float:
    """A power of two: a rate with which a server keeps up if it takes `seconds` for one request."""
    return 2.0 ** math.floor(math.log2(0.5 / max(seconds, 1e-6)))


async def to_saturation(start: float, run: Try) -> None:
    """Double the rate until every target is saturated, then halve the interval in between, on a logarithmic
    scale."""
    known: dict[float, Sequence[bool]] = {}
    rate = start
    for _ in range(MAX_DOUBLINGS):
        known[rate] = await run(rate)
        if all(known[rate]):
            break
        rate *= 2
    for _ in range(BISECTIONS):
        for target in range(len(known[start])):
            middle = _middle({rate: full[target] for rate, full in known.items()})
            if middle is not None and middle not in known:
                known[middle] = await run(middle)


def _middle(known: dict[float, bool]) -> float | None:
    """The middle of the lowest rate that saturates and the highest rate below it. None if either is missing."""
    high = min((rate for rate, full in known.items() if full), default=None)
    low = max((rate for rate in known if high is not None and rate < high), default=None)
    return None if high is None or low is None else float(f"{math.sqrt(low * high):.3g}")
