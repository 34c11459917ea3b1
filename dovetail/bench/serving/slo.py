"""A service-level objective: how long a request may take."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dovetail.bench.serving.request import Record
from dovetail.core.errors import ConfigError
from dovetail.host.units import parse_duration

ATTAINED = 0.9  # share of the requests that must meet it for a rate to count as met


@dataclass(frozen=True)
class SLO:
    """Seconds to the first token, per token after it, and for the whole answer. None means no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> SLO:
        """`ttft=500ms,tpot=50ms,e2e=10s`, any of them. Raises ConfigError."""
        names = [f.name for f in fields(cls)]
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals or name not in names:
                raise ConfigError(f"--slo {text}: write {', '.join(names)} as in ttft=500ms,tpot=50ms")
            if name in limits:
                raise ConfigError(f"--slo {text}: {name} is given twice")
            limits[name] = parse_duration(value)
            if limits[name] <= 0:
                raise ConfigError(f"--slo {text}: {name} must be above 0")
        return cls(**limits)

    def met(self, record: Record) -> bool:
        """Whether the answer is whole and in time. An answer of one token always meets the time per token."""
        if not record.ok or record.ttft is None or record.e2e is None:
            return False
        pairs = ((self.ttft, record.ttft), (self.tpot, record.tpot), (self.e2e, record.e2e))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)

    def to_dict(self) -> dict[str, float]:
        """The limits that are set, in milliseconds."""
        return {f"{name}_ms": limit * 1e3 for name, limit in vars(self).items() if limit is not None}
