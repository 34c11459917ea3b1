from __future__ import annotations

import itertools
import math
import statistics
from random import Random

import pytest

from dovetail.bench.serving.arrivals import Arrivals, Pattern
from dovetail.core.errors import ConfigError

N = 20_000


def times(pattern: Pattern, rate: float, cv: float = 2.0, seed: int = 0, count: int = N) -> list[float]:
    return list(itertools.islice(Arrivals(pattern, cv).times(rate, Random(seed)), count))


def gaps(found: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise([0.0, *found])]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.25, 3.0, 400.0])
@pytest.mark.parametrize(
    ("pattern", "cv"),
    [(Pattern.POISSON, 1.0), (Pattern.BURSTY, 0.5), (Pattern.BURSTY, 1.0), (Pattern.BURSTY, 3.0)],
)
def test_gaps_have_the_mean_and_variation_that_were_asked_for(pattern, cv, rate, seed) -> None:
    found = gaps(times(pattern, rate, cv, seed))
    assert min(found) >= 0
    mean = statistics.fmean(found)
    # Five standard errors: of the mean cv/sqrt(n); a gamma's sample deviation varies with its kurtosis, 6 cv^2.
    assert mean * rate == pytest.approx(1, abs=5 * cv / math.sqrt(N))
    error = math.sqrt((2 + 6 * cv * cv) / (4 * N))
    assert statistics.pstdev(found) / mean == pytest.approx(cv, rel=5 * error + 0.01)


@pytest.mark.parametrize("seed", range(4))
def test_poisson_counts_vary_as_much_as_their_mean(seed) -> None:
    counts = [0] * 1000
    for at in itertools.takewhile(lambda at: at < 1000, Arrivals().times(8.0, Random(seed))):
        counts[int(at)] += 1
    assert statistics.fmean(counts) == pytest.approx(8, rel=0.06)
    assert statistics.variance(counts) == pytest.approx(8, rel=0.25)


def test_poisson_and_bursty_gaps_do_not_remember_the_one_before() -> None:
    for pattern in (Pattern.POISSON, Pattern.BURSTY):
        found = gaps(times(pattern, 1.0))
        assert abs(statistics.correlation(found, found[1:] + found[:1])) < 0.05


def test_constant_gaps_are_equal() -> None:
    assert times(Pattern.CONSTANT, 4.0, count=3) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("pattern", Pattern)
def test_an_infinite_rate_is_all_at_once(pattern) -> None:
    assert times(pattern, math.inf, count=5) == [0.0] * 5


def test_the_same_seed_gives_the_same_times() -> None:
    assert times(Pattern.BURSTY, 2.0, seed=7, count=50) == times(Pattern.BURSTY, 2.0, seed=7, count=50)
    assert times(Pattern.BURSTY, 2.0, seed=7, count=50) != times(Pattern.BURSTY, 2.0, seed=8, count=50)


@pytest.mark.parametrize("cv", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_variation_is_refused(cv) -> None:
    with pytest.raises(ConfigError, match="--cv"):
        Arrivals(Pattern.BURSTY, cv)
