"""SmartSpec (Liu et al., arXiv 2406.14066): speculation only as far as it raises goodput.

Wraps one drafter or several. In each step it chooses how many guessed tokens of each request are verified, for all
requests together, so that the expected tokens per second are highest (`choice`). It learns how long steps take on
this machine (`step_time`), what guesses cost (`draft_time`) and how often they are right (`acceptance`), while it
serves (`controller`). Lossless, as its drafter are.

The paper has one acceptance rate, one length for the whole batch, and times profiled before. Here each request and
position has its own, and nothing is profiled.
"""

from __future__ import annotations

from dovetail.core.errors import ConfigError
from dovetail.core.scheduler import MAX_DRAFTS
from dovetail.core.seams import Geometry, Seams, Site
from dovetail.core.technique import Beside, Technique
from dovetail.techniques.smartspec.controller import SmartSpec
from dovetail.techniques.smartspec.side import Side


def smartspec(drafter: tuple[Technique, ...], fixed: int = -1) -> Technique:
    """Ask a drafter for guesses and verify what pays. Of several, those without KV of their own are asked first.

    fixed: always so many tokens, without choosing; -1 chooses.
    """
    if not -1 <= fixed <= MAX_DRAFTS:
        raise ConfigError(f"smartspec: fixed must be -1 (chosen by goodput) to {MAX_DRAFTS} tokens, got {fixed}")
    for other in drafter:
        if other.fills != ("drafter",) or other.name == "smartspec":
            raise ConfigError(f"smartspec: {other.name} is no drafter that can be wrapped; it fills {other.fills}")
    names = [d.name for d in drafter]
    if len(set(names)) < len(names):
        raise ConfigError(f"smartspec: {'+'.join(names)} names a drafter twice; name each once")

    def build(site: Site) -> dict[str, object]:
        sides = [Side(d.name, d.build(site)["drafter"]) for d in drafter]
        sides.sort(key=lambda side: side.drafter.writes)
        return {"drafter": SmartSpec(sides, fixed, lambda: site.clock.now())}

    def beside(shape: Geometry, page_size: int, value: int) -> Beside:
        return sum((d.beside(shape, page_size, value) for d in drafter), Beside())

    qualified = len(drafter) > 1
    inner = {f"{d.name}.{k}" if qualified else k: v for d in drafter for k, v in d.options.items()}
    return Technique(
        name="smartspec",
        fills=("drafter",),
        build=build,
        options={"drafter": "+".join(names), "fixed": fixed, **inner},
        needs=frozenset().union(*(d.needs for d in drafter)),
        lossless=True,
        activity=_activity,
        beside=beside,
        counters=_counters,
    )


def _counters(seams: Seams) -> dict[str, float]:
    """Of steps that were predicted: what was predicted, what they took, and the sum of differences."""
    d = seams.drafter
    if not isinstance(d, SmartSpec):
        return {}
    return {
        "predicted_seconds": d.predicted,
        "measured_seconds": d.measured,
        "difference_seconds": d.off,
    }


def _activity(seams: Seams) -> int:
    return seams.drafter.guessed if isinstance(seams.drafter, SmartSpec) else 0
