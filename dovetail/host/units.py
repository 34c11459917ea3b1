"""Sizes in bytes and durations in seconds, as people write them: `512MiB`, `30s`, `1h30m`."""

from __future__ import annotations

import re

from dovetail.core.errors import ConfigError

# A bare letter means the binary unit, as in `ulimit`, `docker` and `dd`; `MB` is the decimal one.
_SIZES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _SIZES |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}

_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})\s*([a-z]*)", re.ASCII)
_DURATION = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})\s*([a-z]+)\s*", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}(?:\.\d{0,18})?|\.\d{1,18}", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes named by `text`: `4096`, `512MiB`, `1.5GB`, `2G` (= 2GiB). Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _SIZES:
        raise ConfigError(f"{text!r} is not a size; write bytes or a unit, as in 4096, 512MiB or 1.5GB")
    return int(float(match[1]) * _SIZES[match[2]]) if "." in match[1] else int(match[1]) * _SIZES[match[2]]


def parse_duration(text: str) -> float:
    """Seconds named by `text`: `30`, `250ms`, `30s`, `1h30m`. Raises ConfigError."""
    compact = text.strip().lower()
    if _NUMBER.fullmatch(compact):
        return float(compact)
    seconds, position = 0.0, 0
    for match in _DURATION.finditer(compact):
        if match.start() != position or match[2] not in _SECONDS:
            break
        seconds += float(match[1]) * _SECONDS[match[2]]
        position = match.end()
    if position != len(compact) or not compact:
        raise ConfigError(f"{text!r} is not a duration; write seconds or a unit, as in 30, 250ms, 30s or 1h30m")
    return seconds


def format_size(count: float) -> str:
    """`count` bytes with three significant digits in binary units: 93.8MiB."""
    sign, value = ("-" if count < 0 else ""), abs(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    digits = 0 if units[0] == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{sign}{value:.{digits}f}{units[0]}"


def format_duration(seconds: float) -> str:
    """`seconds` as a person reads it: 4.2ms, 1.35s, 2m05s, 3h07m."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
