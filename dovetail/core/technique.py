"""A technique is a record of the seams that it fills; a composition is several that fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dovetail.core.errors import ConfigError
from dovetail.core.seams import SEAMS, Geometry, Seams, Site


@dataclass(frozen=True)
class Beside:
    """Bytes that techniques keep on the device in addition to K and V.

    page: for each page, over all layers. request: for each running request. by: the names of the techniques.
    """

    page: int = 0
    request: int = 0
    by: tuple[str, ...] = ()

    def __add__(self, other: Beside) -> Beside:
        return Beside(self.page + other.page, self.request + other.request, self.by + other.by)


def _nothing(shape: Geometry, page_size: int, value: int) -> Beside:
    return Beside()


@dataclass(frozen=True)
class Technique:
    """A published system, or any other part, that fills seams.

    `build(site)` makes the objects that fill the seams, one set for each engine. So a record can be used many
    times. `needs` are facts that the model or the engine offers, never names. `lossless`: greedy text is the plain
    engine's at every setting. `exact_at`: options at which a lossy technique must equal the plain engine token for
    token. `activity(seams)` counts how often it acted. `beside(geometry, tokens of a page, bytes of a value of a
    key)` is what it keeps on the device. `counters(seams)`: totals since the start, by what they count and its
    unit.
    """

    name: str
    fills: tuple[str, ...]
    build: Callable[[Site], Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    lossless: bool = False
    exact_at: Mapping[str, Any] = field(default_factory=dict)
    activity: Callable[[Seams], int] = lambda seams: 0
    beside: Callable[[Geometry, int, int], Beside] = _nothing
    counters: Callable[[Seams], Mapping[str, float]] = lambda seams: {}

    @property
    def spec(self) -> str:
        """The text that names this technique with its options."""
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def idle(activity: Mapping[str, int]) -> list[str]:
    """The techniques whose activity is zero."""
    return [name for name, count in activity.items() if not count]


@dataclass(frozen=True)
class Composition:
    """Techniques that fit together. `build(site)` fills the seams."""

    techniques: tuple[Technique, ...] = ()

    def build(self, site: Site) -> Seams:
        parts: dict[str, Any] = {}
        for t in self.techniques:
            built = t.build(site)
            if set(built) != set(t.fills):
                raise ConfigError(f"{t.name} says it fills {sorted(t.fills)} but built {sorted(built)}")
            parts.update(built)
        return Seams(**parts)

    def beside(self, shape: Geometry, page_size: int, value: int) -> Beside:
        """The sum of what the techniques keep."""
        kept = ((t.name, t.beside(shape, page_size, value)) for t in self.techniques)
        return sum((replace(b, by=(name,)) for name, b in kept if b != Beside()), Beside())

    @property
    def specs(self) -> list[str]:
        return [t.spec for t in self.techniques]


PROVIDERS = {  # what users can do about needs
    "a slow tier": "give its size with --kv-offloading-size",
    "weights that are not quantized": "take a checkpoint in bf16, float16 or float32, or let `dovetail quantize` "
    "make one of these weights",
}


def compose(*techniques: Technique, facts: frozenset[str] = frozenset()) -> Composition:
    """Put techniques together, or refuse with ConfigError naming both parties.

    `facts` is what the model and the engine themselves offer (a slow tier, sliding-window layers, ...).
    """
    owner: dict[str, Technique] = {}
    for t in techniques:
        for seam in t.fills:
            if seam not in SEAMS:
                raise ConfigError(f"{t.name} fills '{seam}', which is no seam; the seams are {', '.join(SEAMS)}")
            if seam in owner and owner[seam].name == t.name:
                raise ConfigError(f"{t.name} is given twice; name it once, with all its options")
            if seam in owner:
                raise ConfigError(
                    f"{owner[seam].name} and {t.name} both fill the '{seam}' seam; use one of them, "
                    f"or a wrapper that takes the other as an option"
                )
            owner[seam] = t
    for t in techniques:
        if missing := t.needs - facts:
            advice = "".join(f"; {PROVIDERS[m]}" for m in sorted(missing) if m in PROVIDERS)
            raise ConfigError(f"{t.name} needs {', '.join(sorted(missing))}, which nothing here provides{advice}")
    return Composition(techniques)
