"""The engines of a comparison, or a single one: their readings, and the result."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail.bench.rounds import Samples, medians, ratios, spreads
from dovetail.core import technique
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import TORCH

if TYPE_CHECKING:
    from dovetail.llm import LLM
    from dovetail.setting import Setting


class Side:
    """An engine that is measured. `samples` has a reading of every figure for every round."""

    def __init__(self, setting: Setting, model: str) -> None:
        self.setting = setting
        self.llm: LLM = setting.load(model)
        self.llm.keep_packed()
        self.samples: Samples = {}
        self.facts: dict[str, Any] = {}  # what the result says besides figures
        self._acted: collections.Counter[str] = collections.Counter()

    def read(self, path: tuple[str, ...], reading: float) -> None:
        """Add a round's reading of a figure."""
        self.samples.setdefault(path, []).append(reading)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Where torch computes, set its threads for this engine while the body runs: torch has one number for the
        whole process."""
        if self.llm.config.kernels == TORCH:
            torch.set_num_threads(self.llm.config.threads)
        yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count what techniques do in the body as their activity."""
        before = self.llm.activity()
        yield
        self._acted.update({name: count - before[name] for name, count in self.llm.activity().items()})

    def figures(self) -> dict[str, Any]:
        """Every figure, at its place: the median of its readings."""
        return medians(self.samples)

    @property
    def activity(self) -> dict[str, int]:
        """How often each technique in use acted while it was watched."""
        return {t.name: self._acted[t.name] for t in self.llm.techniques}


def result(model: str, sides: Sequence[Side]) -> dict[str, Any]:
    """The figures of the first side. With a second side, its figures are under `against`, and `ratio` has the
    first over the second."""
    from dovetail.provenance import provenance

    first, *others = sides
    found = {"model": model, **_figures(first)}
    for second in others:
        config = provenance(second.llm)["config"]
        found["against"] = {"setting": second.setting.name, **_figures(second), "config": config}
        compared = ratios(first.samples, second.samples)
        found["ratio"] = medians(compared)
        found["spread"]["ratio"] = spreads(compared)
    return found | provenance(first.llm)


def idle(found: Mapping[str, Any]) -> list[str]:
    """Techniques of a result that were in use and never acted."""
    sides = (found, found.get("against", {"activity": {}}))
    return [name for side in sides for name in technique.idle(side["activity"])]


def _figures(side: Side) -> dict[str, Any]:
    figures = {"use": list(side.llm.config.use), **side.facts, **side.figures()}
    return {**figures, "spread": spreads(side.samples), "activity": side.activity}
