"""The base class of the suites of `dovetail eval`: a measurement of one engine's quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.llm import LLM

Result = dict[str, Any]
CONTEXT = 512


class Suite:
    """A measurement. Subclasses are frozen dataclasses whose fields are the suite's options.

    quality: the key in a result that says how good an engine is. higher: whether more of it is better. columns:
    the keys that a table of several results shows.
    """

    name: ClassVar[str]
    quality: ClassVar[str]
    higher: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()
    wide: ClassVar[bool] = False  # whether `text` says more than a table of several results
    compares: ClassVar[bool] = False  # whether `measure` needs a reference engine

    def refer(self, llm: LLM) -> Any:
        """What `measure` needs from the reference engine. Called once, and only if the suite `compares`."""
        raise NotImplementedError

    def measure(self, llm: LLM, reference: Any) -> Result:
        """Measure an engine. Returns figures as plain data, with `seconds`, the `tokens` that were scored or
        generated in that time, and `tokens_per_s`. The speed of decoding is measured afterwards (`evals.run`).

        RequestError or ConfigError if the engine cannot do what is asked.
        """
        raise NotImplementedError

    def context(self, result: Result) -> int:
        """Tokens of context behind which decoding is timed."""
        return CONTEXT

    def share(self, result: Result, key: str) -> tuple[float, int] | None:
        """Successes and trials, if the figure `key` is a share of trials; None if it is exact."""
        return None

    def questions(self) -> str | None:
        """The digest of the file of questions, each of which is answered right or wrong. A result then has `items`
        with `line` and `correct`, and results on the same file are paired (`evals.paired`). None if a suite has no
        such questions."""
        return None

    def text(self, result: Result) -> str:
        """A result for people, in a few lines."""
        raise NotImplementedError

    def draw(self, results: list[Result]) -> Any:
        """A matplotlib Figure of results. Default: quality against speed."""
        from dovetail.evals.plots import quality_against_speed

        return quality_against_speed(self, results)

    @property
    def facts(self) -> dict[str, Any]:
        """The options, as plain data for results."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in given.items()}


def build(kind: type[Suite], given: Mapping[str, Any]) -> Suite:
    """A suite with the given options. ConfigError for an option that it does not have."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            takes = ", ".join(_flag(n) for n in known)
            raise ConfigError(f"the suite {kind.name} takes no {_flag(name)}; it takes {takes}")
    return kind(**given)


def at_least(least: int, **options: int | None) -> None:
    """ConfigError if a given option is below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"{_flag(name)} must be at least {least}, got {value}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
